//! Labels that take a Service or a slice away from the proxy: the API server filters, so a change of a label arrives as
//! a deletion or an addition.

use k8s_openapi::api::{core::v1::Service, discovery::v1::EndpointSlice};
use serde_json::{Value, json};

use crate::{fixture::SOON, objects, upstream::world};

fn label(key: &str, value: Value) -> Value {
    json!({"metadata": {"labels": {key: value}}})
}

#[test]
fn rule_7_a_service_given_to_another_proxy_is_taken_down_and_restored() {
    const KEY: &str = "service.kubernetes.io/service-proxy-name";
    let cluster = world();
    let vips = cluster.create_service("handed-over");
    cluster.create_slices("handed-over", &["pod-a"]);
    cluster.served_by(&vips, "pod-a", SOON);

    // The label counts by its presence: an empty value is one.
    for value in ["another-proxy", ""] {
        cluster.api.patch::<Service>("default", "handed-over", label(KEY, json!(value))).unwrap();
        cluster.gone(&vips, SOON);
        cluster.api.patch::<Service>("default", "handed-over", label(KEY, Value::Null)).unwrap();
        cluster.served_by(&vips, "pod-a", SOON);
    }
}

#[test]
fn rule_7_a_slice_that_becomes_headless_is_not_used_until_the_label_goes() {
    const KEY: &str = "service.kubernetes.io/headless";
    let cluster = world();
    let vips = cluster.create_service("labelled");
    cluster.create_slices("labelled", &["pod-a"]);
    cluster.served_by(&vips, "pod-a", SOON);
    let patch = |value: Value| {
        for v6 in [false, true] {
            let name = objects::slice_name("labelled", v6);
            cluster.api.patch::<EndpointSlice>("default", &name, label(KEY, value.clone())).unwrap();
        }
    };
    patch(json!(""));
    cluster.refused(&vips, SOON);
    patch(Value::Null);
    cluster.served_by(&vips, "pod-a", SOON);
}

#[test]
fn rule_2_the_label_of_another_proxy_on_a_slice_changes_nothing() {
    const KEY: &str = "service.kubernetes.io/service-proxy-name";
    let cluster = world();
    let vips = cluster.create_service("labelled-otherwise");
    for v6 in [false, true] {
        let mut slice = objects::slice("labelled-otherwise", v6, &cluster.addresses(&["pod-a"], v6));
        slice.metadata.labels.get_or_insert_default().insert(KEY.to_owned(), "another-proxy".to_owned());
        cluster.api.create(&slice).unwrap();
    }
    cluster.served_by(&vips, "pod-a", SOON);
}
