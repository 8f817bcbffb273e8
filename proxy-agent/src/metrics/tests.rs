//! What is measured comes out under its name, and `docs/metrics.md` knows it.

use super::*;

fn value(text: &str, sample: &str) -> Option<f64> {
    text.lines().find_map(|line| line.strip_prefix(sample)?.strip_prefix(' ')?.parse().ok())
}

#[test]
fn rule_135_a_change_is_measured_from_what_caused_it() {
    let metrics = Metrics::new();
    let count = |metrics: &Metrics, family: &str| {
        let sample = format!("kubeproxy_network_programming_duration_seconds_count{{ip_family=\"{family}\"}}");
        value(&metrics.encode(), &sample)
    };
    let since_1970 = |time: SystemTime| time.duration_since(SystemTime::UNIX_EPOCH).unwrap();
    let started = since_1970(metrics.syncs.started);
    metrics.syncs.programmed(IpFamily::V4, started);
    metrics.syncs.programmed(IpFamily::V4, Duration::ZERO);
    assert_eq!(count(&metrics, "IPv4"), Some(0.0), "from before the start");
    metrics.syncs.programmed(IpFamily::V4, started + Duration::from_nanos(1));
    metrics.syncs.programmed(IpFamily::V6, since_1970(SystemTime::now()) + Duration::from_secs(60));
    let text = metrics.encode();
    assert_eq!((count(&metrics, "IPv4"), count(&metrics, "IPv6")), (Some(1.0), Some(1.0)));
    let bucket = |le: &str| {
        let bucket = format!("kubeproxy_network_programming_duration_seconds_bucket{{le=\"{le}\",ip_family=\"IPv6\"}}");
        value(&text, &bucket)
    };
    assert_eq!(bucket("0.25"), Some(1.0), "a clock that is ahead: {text}");
    for le in ["0.5", "1.0", "59.0", "60.0", "115.0", "120.0", "300.0", "+Inf"] {
        assert_eq!(bucket(le), Some(1.0), "kube-proxy's bucket {le}: {text}");
    }
}

#[test]
fn a_sync_says_when_it_was_due_and_done() {
    let metrics = Metrics::new();
    let now = Moment::now();
    let (v4, v6) = (Families::one(IpFamily::V4), Families::one(IpFamily::V6));
    metrics.syncs.queued(Families::BOTH, now);
    metrics.syncs.done(Families::BOTH, v6, now, now);
    metrics.syncs.done(Families::NONE, Families::NONE, now, now);
    let text = metrics.encode();
    let at = |name: &str, family: &str| {
        value(&text, &format!("kubeproxy_sync_proxy_rules_{name}_timestamp_seconds{{ip_family=\"{family}\"}}"))
    };
    let due = at("last_queued", "IPv6");
    assert!(due.is_some_and(|due| due > 1.7e9) && at("last_queued", "IPv4") == due, "{text}");
    assert_eq!((at("last", "IPv4"), at("last", "IPv6")), (due, None), "IPv6 is behind");
    assert_eq!(value(&text, "fairlead_sync_duration_seconds_count"), Some(1.0), "nothing to do is no sync");
    assert_eq!(v4.or(v6), Families::BOTH);
}

#[test]
fn answers_are_counted_by_code() {
    let metrics = Metrics::new();
    metrics.answers.count(Question::Ready, StatusCode::SERVICE_UNAVAILABLE);
    metrics.answers.count(Question::Live, StatusCode::OK);
    metrics.answers.count(Question::Live, StatusCode::OK);
    let text = metrics.encode();
    assert_eq!(value(&text, "kubeproxy_proxy_healthz_total{code=\"503\"}"), Some(1.0), "{text}");
    assert_eq!(value(&text, "kubeproxy_proxy_livez_total{code=\"200\"}"), Some(2.0), "{text}");
}

#[test]
fn lists_and_failures_are_counted_by_kind() {
    use crate::index::Kind;
    let metrics = Metrics::new();
    metrics.api.listed(Kind::EndpointSlice);
    metrics.api.failed(Kind::Service, "429");
    metrics.api.failed(Kind::Service, "429");
    let text = metrics.encode();
    for (sample, expected) in [
        ("fairlead_api_lists_total{kind=\"EndpointSlice\"}", Some(1.0)),
        ("fairlead_api_lists_total{kind=\"ServiceCIDR\"}", Some(0.0)),
        ("fairlead_api_errors_total{kind=\"Service\",reason=\"429\"}", Some(2.0)),
        ("fairlead_api_errors_total{kind=\"Service\",reason=\"unreachable\"}", Some(0.0)),
        ("fairlead_api_errors_total{kind=\"Node\",reason=\"429\"}", None),
    ] {
        assert_eq!(value(&text, sample), expected, "{text}");
    }
}

#[test]
fn the_process_is_measured() {
    let text = Metrics::new().encode();
    let resident = value(&text, "process_resident_memory_bytes");
    assert!(resident.is_some_and(|bytes| bytes > 1e6 && bytes < 1e10), "{text}");
    assert!(value(&text, "process_open_fds").is_some_and(|fds| fds >= 3.0), "{text}");
    assert!(value(&text, "process_cpu_seconds_total").is_some(), "{text}");
}
