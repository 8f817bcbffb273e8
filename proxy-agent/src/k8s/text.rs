//! What the API server sends, from text to objects. One object that cannot be read takes no other with it.

use k8s_openapi::apimachinery::pkg::apis::meta::v1::ObjectMeta;
use kube::core::error_boundary::DeserializeGuard;
use kube::core::{Status, WatchEvent};
use serde::Deserialize;
use serde::de::DeserializeOwned;

use super::failure::Failure;
use crate::model::ObjectName;

/// An object, or what can be said of one that cannot be read.
#[derive(Debug)]
pub(super) struct Object<K> {
    /// Its name.
    pub(super) name: ObjectName,
    /// Its version.
    pub(super) version: String,
    /// Itself, or what is wrong with it.
    pub(super) object: Result<K, String>,
}

impl<K: kube::Resource> Object<K> {
    fn new(object: K) -> Result<Self, Failure> {
        let (name, version) = identity(object.meta())?;
        Ok(Self { name, version, object: Ok(object) })
    }

    fn guarded(DeserializeGuard(object): DeserializeGuard<K>) -> Result<Self, Failure> {
        match object {
            Ok(object) => Self::new(object),
            Err(invalid) => {
                let (name, version) = identity(&invalid.metadata)?;
                Ok(Self { name, version, object: Err(invalid.error) })
            }
        }
    }
}

fn identity(meta: &ObjectMeta) -> Result<(ObjectName, String), Failure> {
    let name = meta.name.as_deref().unwrap_or_default();
    let version = meta.resource_version.as_deref().unwrap_or_default();
    if name.is_empty() || version.is_empty() {
        return Err(Failure::Malformed("an object without a name or a resourceVersion".to_owned()));
    }
    Ok((ObjectName::new(meta.namespace.as_deref().unwrap_or_default(), name), version.to_owned()))
}

/// A page of a list.
#[derive(Debug)]
pub(super) struct Page<K> {
    /// The version of the list.
    pub(super) version: String,
    /// Where the next page begins.
    pub(super) next: Option<String>,
    /// The objects.
    pub(super) items: Vec<Object<K>>,
}

#[derive(Deserialize)]
struct List<T> {
    metadata: Meta,
    // `null` where there are none.
    items: Option<Vec<T>>,
}

#[derive(Deserialize)]
struct Meta {
    #[serde(rename = "resourceVersion", default)]
    version: String,
    #[serde(rename = "continue", default)]
    next: String,
}

/// Reads a page.
pub(super) fn page<K: kube::Resource + DeserializeOwned>(text: &[u8]) -> Result<Page<K>, Failure> {
    // The guard reads each object twice, so it is for pages that need one.
    let (metadata, items) = match serde_json::from_slice::<List<K>>(text) {
        Ok(List { metadata, items }) => {
            let items = items.into_iter().flatten().map(Object::new).collect::<Result<_, _>>()?;
            (metadata, items)
        }
        Err(_) => {
            let List { metadata, items } =
                serde_json::from_slice::<List<DeserializeGuard<K>>>(text).map_err(unclear)?;
            (metadata, items.into_iter().flatten().map(Object::guarded).collect::<Result<_, _>>()?)
        }
    };
    let next = Some(metadata.next).filter(|next| !next.is_empty());
    if metadata.version.is_empty() {
        return Err(Failure::Malformed("a list without a resourceVersion".to_owned()));
    }
    Ok(Page { version: metadata.version, next, items })
}

/// One line of a watch.
#[derive(Debug)]
pub(super) enum Event<K> {
    /// It came or changed.
    Apply(Object<K>),
    /// It went.
    Delete(Object<K>),
    /// Nothing before this version is to come.
    Bookmark(String),
    /// The watch is over.
    Error(Box<Status>),
}

/// Reads a line.
pub(super) fn event<K: kube::Resource + DeserializeOwned>(line: &str) -> Result<Event<K>, Failure> {
    match serde_json::from_str::<WatchEvent<K>>(line) {
        Ok(event) => read(event, Object::new),
        Err(error) if error.is_eof() => Err(Failure::Cut(error.into())),
        Err(_) => {
            read(serde_json::from_str::<WatchEvent<DeserializeGuard<K>>>(line).map_err(unclear)?, Object::guarded)
        }
    }
}

fn read<K, T>(event: WatchEvent<T>, object: impl FnOnce(T) -> Result<Object<K>, Failure>) -> Result<Event<K>, Failure> {
    Ok(match event {
        WatchEvent::Added(it) | WatchEvent::Modified(it) => Event::Apply(object(it)?),
        WatchEvent::Deleted(it) => Event::Delete(object(it)?),
        WatchEvent::Bookmark(bookmark) => Event::Bookmark(bookmark.metadata.resource_version),
        WatchEvent::Error(status) => Event::Error(status),
    })
}

fn unclear(error: serde_json::Error) -> Failure {
    Failure::Malformed(error.to_string())
}

#[cfg(test)]
mod tests {
    use k8s_openapi::api::core::v1::Service;
    use serde_json::{Value, json};

    use super::*;

    fn service(name: &str, port: Value) -> Value {
        json!({"metadata": {"name": name, "namespace": "a", "resourceVersion": "7"}, "spec": {"ports": [{"port": port}]}})
    }

    fn listed(items: &[Value]) -> Vec<u8> {
        let metadata = json!({"resourceVersion": "9", "continue": "more"});
        json!({"kind": "ServiceList", "metadata": metadata, "items": items}).to_string().into_bytes()
    }

    #[test]
    fn an_object_that_cannot_be_read_takes_no_other_with_it() {
        let page = page::<Service>(&listed(&[service("good", json!(80)), service("bad", json!("eighty"))])).unwrap();
        assert_eq!((page.version.as_str(), page.next.as_deref()), ("9", Some("more")));
        let [good, bad] = &page.items[..] else { panic!("two objects") };
        assert!(good.object.is_ok() && good.name == ObjectName::new("a", "good"));
        assert_eq!((&bad.name, bad.version.as_str()), (&ObjectName::new("a", "bad"), "7"));
        assert!(bad.object.as_ref().unwrap_err().contains("eighty"), "{:?}", bad.object);
    }

    #[test]
    fn an_event_with_such_an_object_still_has_its_name_and_version() {
        for (kind, deleted) in [("ADDED", false), ("MODIFIED", false), ("DELETED", true)] {
            let line = json!({"type": kind, "object": service("bad", json!({}))}).to_string();
            let (object, is_deleted) = match event::<Service>(&line).unwrap() {
                Event::Apply(object) => (object, false),
                Event::Delete(object) => (object, true),
                other => panic!("{other:?}"),
            };
            assert_eq!(
                (object.name, object.version, is_deleted),
                (ObjectName::new("a", "bad"), "7".to_owned(), deleted)
            );
            object.object.unwrap_err();
        }
    }

    #[test]
    fn half_a_line_is_cut_and_nonsense_makes_no_sense() {
        let line = json!({"type": "ADDED", "object": service("a", json!(80))}).to_string();
        for end in 1..line.len() {
            assert!(matches!(event::<Service>(&line[..end]), Err(Failure::Cut(_))), "{}", &line[..end]);
        }
        for nonsense in ["<html>", "[]", "{}", r#"{"type":"ADDED","object":{}}"#, r#"{"type":"NEWS","object":{}}"#] {
            assert!(matches!(event::<Service>(nonsense), Err(Failure::Malformed(_))), "{nonsense}");
        }
        for nonsense in ["<html>", "", "{}", r#"{"metadata":{},"items":[]}"#] {
            assert!(matches!(page::<Service>(nonsense.as_bytes()), Err(Failure::Malformed(_))), "{nonsense}");
        }
        assert!(page::<Service>(br#"{"metadata":{"resourceVersion":"1"},"items":null}"#).unwrap().items.is_empty());
    }

    #[test]
    fn bookmarks_and_errors_are_what_they_are() {
        let bookmark = json!({"type": "BOOKMARK", "object": {"kind": "Service", "apiVersion": "v1", "metadata": {"resourceVersion": "12"}}});
        assert!(matches!(event::<Service>(&bookmark.to_string()), Ok(Event::Bookmark(version)) if version == "12"));
        let gone = json!({"type": "ERROR", "object": {"kind": "Status", "code": 410, "reason": "Expired", "message": "too old"}});
        assert!(matches!(event::<Service>(&gone.to_string()), Ok(Event::Error(status)) if status.code == 410));
    }
}
