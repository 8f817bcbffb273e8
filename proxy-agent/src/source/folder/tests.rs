//! A real folder, a real inotify, and the events that come of it.

use std::path::Path;

use tokio::sync::mpsc::{Receiver, channel};
use tokio::time::timeout;

use super::*;

fn service(name: &str, port: u16) -> String {
    format!(
        "apiVersion: v1\nkind: Service\nmetadata: {{name: {name}}}\nspec: {{clusterIP: 10.96.0.1, ports: [{{port: {port}}}]}}\n"
    )
}

/// The next event as a word: `+a:80` for a Service a with port 80, `-a` when it goes.
async fn next(events: &mut Receiver<Input>) -> Option<String> {
    let Input::Event(event) = timeout(Duration::from_secs(2), events.recv()).await.ok()?? else { return None };
    let of = |object: &crate::index::Object| match object {
        crate::index::Object::Service(s) => format!("{}:{}", s.name.name(), s.ports[0].port),
        crate::index::Object::Slice(s) => s.name.name().to_owned(),
        crate::index::Object::Node(n) => n.name.name().to_owned(),
        crate::index::Object::ServiceCidr(c) => c.name.name().to_owned(),
    };
    Some(match event {
        Event::InitApply(object) => format!("*{}", of(&object)),
        Event::Apply(object) => format!("+{}", of(&object)),
        Event::Delete(_, name) => format!("-{}", name.name()),
        other => format!("{other:?}"),
    })
}

async fn quiet(events: &mut Receiver<Input>) -> bool {
    timeout(EDITOR_PAUSE * 3, events.recv()).await.is_err()
}

async fn started(dir: &Path) -> Receiver<Input> {
    let (to, mut events) = channel(100);
    tokio::spawn(Box::new(Folder::new(dir, "node")).run(to));
    while next(&mut events).await.expect("no first list") != "InitDone(EndpointSlice)" {}
    events
}

#[tokio::test]
async fn the_first_list_is_what_the_folder_holds() {
    let dir = tempfile::tempdir().unwrap();
    std::fs::write(dir.path().join("b.yaml"), service("b", 2)).unwrap();
    std::fs::write(dir.path().join("a.yml"), format!("{}---\nkind: [\n", service("a", 1))).unwrap();
    for ignored in [".a.yaml.swp", "a.yaml~", "#a.yaml#", ".hidden.yaml", "notes.txt"] {
        std::fs::write(dir.path().join(ignored), service("ignored", 3)).unwrap();
    }
    let (to, mut events) = channel(100);
    tokio::spawn(Box::new(Folder::new(dir.path(), "node")).run(to));
    let begin = ["Init(Node)", "Init(ServiceCidr)", "Init(Service)", "Init(EndpointSlice)"];
    let end = ["InitDone(Node)", "InitDone(ServiceCidr)", "InitDone(Service)", "InitDone(EndpointSlice)"];
    for expected in begin.into_iter().chain(["*a:1", "*b:2"]).chain(end) {
        assert_eq!(next(&mut events).await.as_deref(), Some(expected));
    }
}

#[tokio::test]
async fn writing_moving_and_deleting_are_followed() {
    let dir = tempfile::tempdir().unwrap();
    let mut events = started(dir.path()).await;
    let file = dir.path().join("a.yaml");
    std::fs::write(&file, service("a", 1)).unwrap();
    assert_eq!(next(&mut events).await.as_deref(), Some("+a:1"));
    // As sed -i and most editors write: a new file, moved over the old one.
    std::fs::write(dir.path().join("sedXYZ"), service("a", 2)).unwrap();
    std::fs::rename(dir.path().join("sedXYZ"), &file).unwrap();
    assert_eq!(next(&mut events).await.as_deref(), Some("+a:2"));
    std::fs::remove_file(&file).unwrap();
    assert_eq!(next(&mut events).await.as_deref(), Some("-a"));
    let elsewhere = tempfile::tempdir().unwrap();
    std::fs::write(&file, service("a", 3)).unwrap();
    assert_eq!(next(&mut events).await.as_deref(), Some("+a:3"));
    std::fs::rename(&file, elsewhere.path().join("a.yaml")).unwrap();
    assert_eq!(next(&mut events).await.as_deref(), Some("-a"));
}

#[tokio::test]
async fn what_an_editor_does_in_between_is_no_change() {
    let dir = tempfile::tempdir().unwrap();
    let file = dir.path().join("a.yaml");
    std::fs::write(&file, service("a", 1)).unwrap();
    let mut events = started(dir.path()).await;
    // vim: the old file becomes a backup, a new one is written, the backup goes.
    std::fs::rename(&file, dir.path().join("a.yaml~")).unwrap();
    std::fs::write(&file, service("a", 2)).unwrap();
    std::fs::remove_file(dir.path().join("a.yaml~")).unwrap();
    assert_eq!(next(&mut events).await.as_deref(), Some("+a:2"));
    assert!(quiet(&mut events).await);
}

#[tokio::test]
async fn a_half_written_file_takes_nothing_away() {
    let dir = tempfile::tempdir().unwrap();
    let file = dir.path().join("a.yaml");
    let whole = format!("{}---\n{}", service("a", 1), service("b", 2));
    std::fs::write(&file, &whole).unwrap();
    let mut events = started(dir.path()).await;
    let cut = whole.rfind("ports").unwrap();
    std::fs::write(&file, &whole[..cut]).unwrap();
    assert!(quiet(&mut events).await);
    // Still open: nothing is read before it is closed.
    let mut open = std::fs::OpenOptions::new().write(true).truncate(true).open(&file).unwrap();
    std::io::Write::write_all(&mut open, service("a", 7).as_bytes()).unwrap();
    assert!(quiet(&mut events).await);
    drop(open);
    let got = [next(&mut events).await.unwrap(), next(&mut events).await.unwrap()];
    assert!(got.contains(&"+a:7".to_owned()) && got.contains(&"-b".to_owned()), "{got:?}");
}

#[tokio::test]
async fn a_mounted_config_map_changes_by_one_link() {
    let dir = tempfile::tempdir().unwrap();
    let at = |path: &str| dir.path().join(path);
    std::fs::create_dir(at("..1")).unwrap();
    std::fs::write(at("..1/a.yaml"), service("a", 1)).unwrap();
    std::os::unix::fs::symlink("..1", at("..data")).unwrap();
    std::os::unix::fs::symlink("..data/a.yaml", at("a.yaml")).unwrap();
    let mut events = started(dir.path()).await;
    std::fs::create_dir(at("..2")).unwrap();
    std::fs::write(at("..2/a.yaml"), service("a", 2)).unwrap();
    std::os::unix::fs::symlink("..2", at("..data_tmp")).unwrap();
    std::fs::rename(at("..data_tmp"), at("..data")).unwrap();
    assert_eq!(next(&mut events).await.as_deref(), Some("+a:2"));
}

#[tokio::test]
async fn an_object_in_two_files_is_taken_from_the_first() {
    let dir = tempfile::tempdir().unwrap();
    let at = |path: &str| dir.path().join(path);
    std::fs::write(at("2.yaml"), service("a", 2)).unwrap();
    let mut events = started(dir.path()).await;
    std::fs::write(at("3.yaml"), service("a", 3)).unwrap();
    assert!(quiet(&mut events).await);
    std::fs::write(at("1.yaml"), service("a", 1)).unwrap();
    assert_eq!(next(&mut events).await.as_deref(), Some("+a:1"));
    std::fs::remove_file(at("1.yaml")).unwrap();
    assert_eq!(next(&mut events).await.as_deref(), Some("+a:2"));
    std::fs::remove_file(at("2.yaml")).unwrap();
    assert_eq!(next(&mut events).await.as_deref(), Some("+a:3"));
}

#[tokio::test]
async fn a_folder_that_is_not_there_is_an_error_by_name() {
    let (to, _events) = channel(1);
    let error = Box::new(Folder::new("/nowhere/at/all", "node")).run(to).await.unwrap_err().to_string();
    assert!(error.starts_with("cannot watch the folder /nowhere/at/all: "), "{error}");

    let dir = tempfile::tempdir().unwrap();
    let (to, _events) = channel(100);
    let run = tokio::spawn(Box::new(Folder::new(dir.path(), "node")).run(to));
    tokio::time::sleep(Duration::from_millis(100)).await;
    drop(dir);
    let error = timeout(Duration::from_secs(2), run).await.unwrap().unwrap().unwrap_err().to_string();
    assert!(error.contains("is gone; put it back and start again"), "{error}");
}
