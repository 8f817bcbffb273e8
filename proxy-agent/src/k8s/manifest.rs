//! Manifests: the text of a file, through Kubernetes' own types, to objects of the model.
//!
//! Each document and each object stands for itself: one that cannot be read is a [`Problem`], and the others are used.

use std::fmt;

use k8s_openapi::api::core::v1 as core;
use k8s_openapi::api::discovery::v1 as discovery;
use k8s_openapi::api::networking::v1 as networking;
use serde::de::DeserializeOwned;
use serde_json::Value;

use super::{Decoded, Warning, endpoint_slice, endpoints, node, service, service_cidr};
use crate::index::{Kind, Object};
use crate::model::ObjectName;

/// What a file holds.
#[derive(Debug, Default)]
pub struct Manifest {
    /// Objects for this proxy.
    pub objects: Vec<Object>,
    /// What could not be read, and what was left out.
    pub problems: Vec<Problem>,
    /// Some document is no YAML, or only the beginning of an object: the file may be half written, and what is missing
    /// may still be meant.
    pub broken: bool,
}

/// Something wrong with a file.
#[derive(Debug)]
pub struct Problem {
    /// Which document of the file, from 1.
    pub document: usize,
    /// `Service default/web`, as far as it is known.
    pub object: String,
    /// What is wrong, and what to do.
    pub what: String,
    /// Objects that may be meant: what was known of them stays.
    pub keeps: Option<(Kind, ObjectName)>,
}

impl fmt::Display for Problem {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "document {}", self.document)?;
        if !self.object.is_empty() {
            write!(f, ", {}", self.object)?;
        }
        write!(f, ": {}", self.what)
    }
}

/// Reads the text of a file: YAML of any number of documents, or JSON.
pub fn parse(text: &str, node: &str) -> Manifest {
    let mut manifest = Manifest::default();
    for (number, (line, document)) in documents(text).into_iter().enumerate() {
        let mut reader = Reader { manifest: &mut manifest, document: number + 1, node };
        match serde_saphyr::from_str::<Option<Value>>(document) {
            Ok(None) => {}
            Ok(Some(value)) => reader.value(value, None),
            Err(error) => reader.no_yaml(&error, line),
        }
    }
    manifest
}

/// The documents of a file, each with the number of lines before it.
fn documents(text: &str) -> Vec<(u64, &str)> {
    let (mut documents, mut start, mut start_line, mut at) = (Vec::new(), 0, 0, 0);
    for (number, line) in (0u64..).zip(text.split_inclusive('\n')) {
        // Three dashes at the beginning of a line part documents wherever they stand (YAML 1.2, 9.1.2).
        if line.strip_prefix("---").is_some_and(|rest| rest.is_empty() || rest.starts_with(char::is_whitespace)) {
            documents.push((start_line, &text[start..at]));
            (start, start_line) = (at, number);
        }
        at += line.len();
    }
    documents.push((start_line, &text[start..]));
    documents.retain(|(_, document)| document.lines().any(|line| !matches!(line.trim_end(), "" | "---")));
    documents
}

struct Reader<'a> {
    manifest: &'a mut Manifest,
    document: usize,
    node: &'a str,
}

impl Reader<'_> {
    fn problem(&mut self, object: &str, what: impl fmt::Display, keeps: Option<(Kind, ObjectName)>) {
        let (document, object, what) = (self.document, object.to_owned(), what.to_string());
        self.manifest.problems.push(Problem { document, object, what, keeps });
    }

    fn no_yaml(&mut self, error: &serde_saphyr::Error, lines_before: u64) {
        let at = error.location().map_or(String::new(), |l| format!("line {}: ", lines_before + l.line()));
        let message = error.without_snippet().to_string();
        // The reader counts lines from the beginning of the document, and names its own options.
        let message = message.lines().next().unwrap_or_default();
        let message = message.split(" at line ").next().unwrap_or_default();
        let message = message.split(", set DuplicateKeyPolicy").next().unwrap_or_default();
        self.manifest.broken = true;
        self.problem("", format_args!("no valid YAML: {at}{message}; correct the syntax"), None);
    }

    /// An object, or a list of them. Items of a typed list need not repeat the list's kind.
    fn value(&mut self, mut value: Value, of_list: Option<(&str, &str)>) {
        let text = |value: &Value, path: &str| value.pointer(path).and_then(Value::as_str).map(str::to_owned);
        if let (Some(object), Some((version, kind))) = (value.as_object_mut(), of_list) {
            object.entry("apiVersion").or_insert_with(|| version.into());
            object.entry("kind").or_insert_with(|| kind.into());
        }
        let Some(kind) = text(&value, "/kind") else {
            self.manifest.broken = true;
            return self.problem("", "no Kubernetes object: it has no kind; add apiVersion and kind", None);
        };
        let version = text(&value, "/apiVersion").unwrap_or_default();
        if let Some(items) = value.get_mut("items").map(Value::take).filter(|_| kind.ends_with("List")) {
            let Value::Array(items) = items else {
                return self.problem(&kind, "items: no list; give a list of objects", None);
            };
            let item = kind.trim_end_matches("List");
            let inherited = (!item.is_empty()).then_some((version.as_str(), item));
            return items.into_iter().for_each(|item| self.value(item, inherited));
        }
        let namespace = text(&value, "/metadata/namespace").unwrap_or_else(|| "default".to_owned());
        let namespace = if matches!(&*kind, "Node" | "ServiceCIDR") { "" } else { &namespace };
        let name = ObjectName::new(namespace, &text(&value, "/metadata/name").unwrap_or_default());
        // The beginning of an object, perhaps: the rest is still to be written.
        self.manifest.broken |= version.is_empty() || name.name().is_empty();
        let id = Id { label: format!("{kind} {name}"), name };
        let own = self.node;
        match (version.as_str(), kind.as_str()) {
            ("v1", "Service") => {
                self.object(value, &id, Kind::Service, service::decode, |service| vec![Object::Service(service)]);
            }
            ("discovery.k8s.io/v1", "EndpointSlice") => {
                let decode = |object: &discovery::EndpointSlice| endpoint_slice::decode(object, own);
                self.object(value, &id, Kind::EndpointSlice, decode, |slice| vec![Object::Slice(slice)]);
            }
            ("v1", "Endpoints") => {
                let decode = |object: &core::Endpoints| endpoints::decode(object, own);
                let slices = |slices: Vec<_>| slices.into_iter().map(Object::Slice).collect();
                self.object(value, &id, Kind::EndpointSlice, decode, slices);
            }
            ("v1", "Node") => {
                let decode = |object: &core::Node| node::decode(object, own);
                self.object(value, &id, Kind::Node, decode, |node| vec![Object::Node(node)]);
            }
            ("networking.k8s.io/v1", "ServiceCIDR") => {
                let decode = |object: &networking::ServiceCIDR| service_cidr::decode(object);
                self.object(value, &id, Kind::ServiceCidr, decode, |cidr| vec![Object::ServiceCidr(cidr)]);
            }
            (_, "Service" | "EndpointSlice" | "Endpoints" | "Node" | "ServiceCIDR") => {
                let known = match &*kind {
                    "EndpointSlice" => "discovery.k8s.io/v1",
                    "ServiceCIDR" => "networking.k8s.io/v1",
                    _ => "v1",
                };
                self.problem(&id.label, format_args!("apiVersion {version:?} is not read; give {known}"), None);
            }
            _ => {
                let known = "only Service, EndpointSlice, Endpoints, Node, ServiceCIDR and lists of them are; move it to \
                             another folder";
                self.problem(&id.label, format_args!("kind {kind} is not read: {known}"), None);
            }
        }
    }

    /// Reads one object of a kind. `objects` makes the index' objects of it.
    fn object<K: DeserializeOwned, T, E: fmt::Display>(
        &mut self,
        value: Value,
        id: &Id,
        kind: Kind,
        decode: impl FnOnce(&K) -> Result<Decoded<T>, E>,
        objects: impl FnOnce(T) -> Vec<Object>,
    ) {
        let keeps = (kind, id.name.clone());
        let object: K = match serde_path_to_error::deserialize(value) {
            Ok(object) => object,
            Err(error) => {
                let (path, problem) = (error.path().to_string(), error.inner().to_string());
                return self.problem(&id.label, format_args!("{path}: {problem}"), Some(keeps));
            }
        };
        let decoded = match decode(&object) {
            Ok(decoded) => decoded,
            Err(error) => return self.problem(&id.label, error, Some(keeps)),
        };
        decoded.warnings.iter().for_each(|warning: &Warning| self.problem(&id.label, warning, None));
        self.manifest.objects.extend(decoded.object.map(objects).into_iter().flatten());
    }
}

/// Which object, for people and for the index.
struct Id {
    label: String,
    name: ObjectName,
}

#[cfg(test)]
mod tests;
