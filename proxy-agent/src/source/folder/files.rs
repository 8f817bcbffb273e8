//! What each manifest of a folder says, and which file an object is taken from.

use std::collections::btree_map::Entry;
use std::collections::{BTreeMap, BTreeSet};
use std::ffi::{OsStr, OsString};

use crate::index::{Event, Kind, Object};
use crate::k8s::manifest::{self, Manifest};
use crate::model::ObjectName;

/// Which object.
type Id = (Kind, ObjectName);

/// What came of reading a file.
#[derive(Debug)]
pub enum Read {
    /// Its text.
    Text(String),
    /// It is not there.
    Gone,
    /// It is there and cannot be read: what it said before stays.
    Unreadable(String),
}

/// What reading a file came to.
#[derive(Debug, Default)]
pub struct Outcome {
    /// What it changes.
    pub events: Vec<Event>,
    /// What is wrong with it, for people.
    pub problems: Vec<String>,
}

/// The manifests of a folder.
#[derive(Debug)]
pub struct Files {
    node: String,
    files: BTreeMap<OsString, BTreeMap<Id, Object>>,
    /// Files that have an object: the first by name counts.
    owners: BTreeMap<Id, BTreeSet<OsString>>,
}

impl Files {
    /// No file yet; endpoints are seen from the node of this name.
    pub const fn new(node: String) -> Self {
        Self { node, files: BTreeMap::new(), owners: BTreeMap::new() }
    }

    /// Names of files with objects.
    pub fn names(&self) -> impl Iterator<Item = &OsString> {
        self.files.keys()
    }

    /// Number of files and of objects.
    pub fn counts(&self) -> (usize, usize) {
        (self.files.len(), self.owners.len())
    }

    /// A file was read.
    pub fn read(&mut self, name: &OsStr, read: Read) -> Outcome {
        let mut problems = Vec::new();
        let objects = match read {
            Read::Text(text) => self.objects(name, manifest::parse(&text, &self.node), &mut problems),
            Read::Gone => BTreeMap::new(),
            Read::Unreadable(error) => {
                problems.push(format!("cannot be read: {error}; what it said before stays"));
                return Outcome { events: Vec::new(), problems };
            }
        };
        let before = self.files.get(name).cloned().unwrap_or_default();
        let ids: BTreeSet<_> = before.keys().chain(objects.keys()).cloned().collect();
        let known: BTreeMap<_, _> = ids.iter().map(|id| (id.clone(), self.object(id).cloned())).collect();
        for id in &ids {
            let owners = self.owners.entry(id.clone()).or_default();
            if objects.contains_key(id) {
                if owners.insert(name.to_owned()) && owners.len() > 1 {
                    problems.push(in_several_files(id, owners));
                }
            } else {
                owners.remove(name);
                if owners.is_empty() {
                    self.owners.remove(id);
                }
            }
        }
        if objects.is_empty() {
            self.files.remove(name);
        } else {
            self.files.insert(name.to_owned(), objects);
        }
        let events = ids.into_iter().filter_map(|id| self.event(&id, known.get(&id)?.as_ref())).collect();
        Outcome { events, problems }
    }

    fn event(&self, id: &Id, known: Option<&Object>) -> Option<Event> {
        match (known, self.object(id)) {
            (known, Some(object)) if known != Some(object) => Some(Event::Apply(object.clone())),
            (Some(_), None) => Some(Event::Delete(id.0, id.1.clone())),
            _ => None,
        }
    }

    fn object(&self, id: &Id) -> Option<&Object> {
        let owner = self.owners.get(id)?.first()?;
        self.files.get(owner)?.get(id)
    }

    /// The objects of a file: what it says now, and what it said before where that cannot be read now.
    fn objects(&self, name: &OsStr, manifest: Manifest, problems: &mut Vec<String>) -> BTreeMap<Id, Object> {
        let before = self.files.get(name);
        let mut objects = BTreeMap::new();
        for object in manifest.objects {
            match objects.entry((object.kind(), object.name().clone())) {
                Entry::Vacant(entry) => {
                    entry.insert(object);
                }
                Entry::Occupied(entry) => {
                    let name = &entry.key().1;
                    problems.push(format!("{name} is in this file twice; the first one counts, remove the other"));
                }
            }
        }
        for problem in &manifest.problems {
            let kept = problem.keeps.as_ref().map_or(0, |keeps| keep(before, &mut objects, |id| is_of(id, keeps)));
            let stays = if kept > 0 { "; what it said before stays" } else { "" };
            problems.push(format!("{problem}{stays}"));
        }
        if manifest.broken {
            let kept = keep(before, &mut objects, |_| true);
            if kept > 0 {
                problems.push(format!("the file may be half written: what it said before stays ({kept} objects)"));
            }
        }
        objects
    }
}

/// Takes over what a file said before, and says how much that was.
fn keep(before: Option<&BTreeMap<Id, Object>>, to: &mut BTreeMap<Id, Object>, which: impl Fn(&Id) -> bool) -> usize {
    let kept: Vec<_> = before.into_iter().flatten().filter(|(id, _)| which(id) && !to.contains_key(id)).collect();
    let count = kept.len();
    to.extend(kept.into_iter().map(|(id, object)| (id.clone(), object.clone())));
    count
}

/// True if the object came from the one of this name: itself, or one of the slices made from it.
fn is_of(id: &Id, (kind, name): &Id) -> bool {
    id.0 == *kind
        && id.1.as_str().strip_prefix(name.as_str()).is_some_and(|rest| rest.is_empty() || rest.starts_with(':'))
}

fn in_several_files(id: &Id, owners: &BTreeSet<OsString>) -> String {
    let files: Vec<_> = owners.iter().map(|file| file.to_string_lossy()).collect();
    format!("{} is in {}; what the first of them says counts, remove it from the others", id.1, files.join(" and "))
}
