//! `/healthz` and `/livez`: kube-proxy's rules 115–121.

use std::sync::Arc;

use super::{Health, Moment, Question};
use crate::http::{self, Place};
use crate::metrics::Answers;

/// Serves for ever.
pub async fn run(place: Place, health: Arc<Health>, answers: Answers) {
    let listener = place.listener().await;
    // Methods are not looked at (rule 115).
    http::serve(listener, move |request| {
        let question = question(request.uri().path());
        let answer = question.map_or_else(http::not_found, |question| answer(question, &health, &answers));
        std::future::ready(answer)
    })
    .await;
}

fn question(path: &str) -> Option<Question> {
    match path {
        "/healthz" => Some(Question::Ready),
        "/" if mutant!("rule-115") => Some(Question::Ready),
        "/livez" => Some(Question::Live),
        _ => None,
    }
}

fn answer(question: Question, health: &Health, answers: &Answers) -> http::Answer {
    let (yes, body) = health.judge(Moment::now()).answer(question);
    let answer = http::json(yes, body);
    answers.count(question, answer.status());
    answer
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn rule_115_two_paths_are_answered_and_no_other() {
        assert_eq!((question("/healthz"), question("/livez")), (Some(Question::Ready), Some(Question::Live)));
        for other in ["", "/", "/healthz/", "/healthz/ready", "/Healthz", "/metrics", "/readyz"] {
            assert_eq!(question(other), None, "{other:?}");
        }
    }
}
