//! Why a list or a watch ended, and what follows from it.

use std::fmt;
use std::io;
use std::time::Duration;

use kube::core::Status;

use super::backoff;

/// A list or a watch that did not go as it should.
#[derive(Debug, thiserror::Error)]
pub(super) enum Failure {
    /// Nobody listens any more: the agent is ending.
    #[error("nobody listens any more")]
    Closed,
    /// It could not be asked for.
    #[error(transparent)]
    Request(kube::Error),
    /// The answer was an error.
    #[error("{} {}: {}", .0.code, .0.reason, .0.message)]
    Refused(Box<Status>),
    /// The server ended a watch with an error.
    #[error("the watch was ended with {} {}: {}", .0.code, .0.reason, .0.message)]
    Event(Box<Status>),
    /// The answer broke off.
    #[error("the answer broke off: {0}")]
    Cut(#[source] io::Error),
    /// The connection stands and nothing comes.
    #[error("the API server said nothing for {} s", .0.as_secs_f32())]
    Silent(Duration),
    /// Bytes came, but in this time not all that a page has.
    #[error("a page of the list did not come within {} s", .0.as_secs_f32())]
    Slow(Duration),
    /// It is nothing that an API server says.
    #[error("the answer makes no sense: {0}")]
    Malformed(String),
    /// A watch told of something older than what it had told already.
    #[error("the watch went back in time, from version {from} to {to}")]
    Backwards { from: String, to: String },
    /// A watch that ended as soon as it had begun, without a word.
    #[error("the watch ended as soon as it had begun")]
    Brief,
}

impl From<kube::Error> for Failure {
    fn from(error: kube::Error) -> Self {
        match error {
            kube::Error::Api(status) => Self::Refused(status),
            error => Self::Request(error),
        }
    }
}

impl Failure {
    /// The HTTP status that the server answered with, in whichever way.
    pub(super) fn status(&self) -> Option<&Status> {
        match self {
            Self::Refused(status) | Self::Event(status) => Some(status),
            _ => None,
        }
    }

    fn code(&self) -> Option<u16> {
        self.status().map(|status| status.code)
    }

    /// What the server has to tell is not what follows from the version that is known: only a list helps.
    pub(super) fn wants_list(&self) -> bool {
        match self {
            Self::Malformed(_) | Self::Backwards { .. } => true,
            _ => self.status().is_some_and(|status| {
                // 400: a version that the server cannot read. 410: one that it has forgotten. Too large: one that it has
                // never heard of, as after a restored backup.
                let too_large = status.details.iter().flat_map(|details| &details.causes);
                matches!(status.code, 400 | 404 | 410)
                    || too_large.into_iter().any(|cause| cause.reason == "ResourceVersionTooLarge")
            }),
        }
    }

    /// The credentials are refused or the server's certificate is not trusted: both may have been replaced.
    pub(super) fn wants_credentials(&self) -> bool {
        self.code() == Some(401)
            || matches!(self, Self::Request(error) if io_error(error).is_some_and(|e| e.kind() == io::ErrorKind::InvalidData))
    }

    /// The kind is not there, or not for this client.
    pub(super) fn is_absent(&self) -> bool {
        matches!(self.code(), Some(403 | 404))
    }

    /// The longest pause before the next attempt.
    pub(super) fn longest_pause(&self) -> Duration {
        match self {
            Self::Refused(_) | Self::Event(_) | Self::Malformed(_) | Self::Backwards { .. } => backoff::REFUSED,
            _ => backoff::UNREACHABLE,
        }
    }

    /// In one word, for metrics.
    pub(super) fn reason(&self) -> String {
        match self {
            Self::Closed => "closed",
            Self::Refused(status) | Self::Event(status) => return status.code.to_string(),
            Self::Request(_) => "unreachable",
            Self::Cut(_) | Self::Brief => "cut",
            Self::Silent(_) | Self::Slow(_) => "stalled",
            Self::Malformed(_) => "malformed",
            Self::Backwards { .. } => "backwards",
        }
        .to_owned()
    }
}

/// The first of an error's causes that the system or the TLS library has reported.
fn io_error<'a>(error: &'a (dyn std::error::Error + 'static)) -> Option<&'a io::Error> {
    let mut cause = Some(error);
    let mut found = None;
    while let Some(error) = cause {
        // The innermost is the one that says what happened.
        found = error.downcast_ref::<io::Error>().or(found);
        cause = error.source();
    }
    found
}

/// An error with its causes, each once.
pub(super) struct Chain<'a>(pub(super) &'a dyn std::error::Error);

impl fmt::Display for Chain<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let mut text = self.0.to_string();
        let mut cause = self.0.source();
        while let Some(error) = cause {
            let message = error.to_string();
            if !text.contains(&message) {
                text = format!("{text}: {message}");
            }
            cause = error.source();
        }
        f.write_str(&text)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn status(value: serde_json::Value) -> Failure {
        Failure::Event(serde_json::from_value(value).unwrap())
    }

    #[test]
    fn a_version_that_the_server_cannot_follow_wants_a_list() {
        for code in [400, 404, 410] {
            assert!(status(serde_json::json!({"code": code})).wants_list(), "{code}");
        }
        let causes =
            serde_json::json!([{"reason": "ResourceVersionTooLarge", "message": "Too large resource version"}]);
        assert!(status(serde_json::json!({"code": 504, "details": {"causes": causes}})).wants_list());
        for code in [401, 403, 429, 500, 503, 504] {
            assert!(!status(serde_json::json!({"code": code})).wants_list(), "{code}");
        }
        assert!(!Failure::Silent(Duration::from_secs(1)).wants_list());
        assert!(Failure::Backwards { from: "2".to_owned(), to: "1".to_owned() }.wants_list());
    }

    #[test]
    fn refused_credentials_and_an_untrusted_certificate_want_new_ones() {
        assert!(status(serde_json::json!({"code": 401})).wants_credentials());
        assert!(!status(serde_json::json!({"code": 403})).wants_credentials());
        let failed = |kind| Failure::Request(kube::Error::Service(Box::new(io::Error::new(kind, "it"))));
        assert!(failed(io::ErrorKind::InvalidData).wants_credentials());
        assert!(!failed(io::ErrorKind::ConnectionRefused).wants_credentials());
    }
}
