//! Manifests in, objects and complaints out.

use std::net::IpAddr;

use super::*;
use crate::model::{EndpointSlice, Hint, IpFamily, Protocol, Service, ServiceType};

fn services(text: &str) -> Vec<Service> {
    let manifest = parse(text, "node-a");
    assert!(manifest.problems.is_empty(), "{:?}", manifest.problems);
    let only = |object| match object {
        Object::Service(service) => Some(service),
        Object::Slice(_) | Object::Node(_) | Object::ServiceCidr(_) => None,
    };
    manifest.objects.into_iter().filter_map(only).collect()
}

fn slices(text: &str) -> Vec<EndpointSlice> {
    let only = |object| match object {
        Object::Slice(slice) => Some(slice),
        Object::Service(_) | Object::Node(_) | Object::ServiceCidr(_) => None,
    };
    parse(text, "node-a").objects.into_iter().filter_map(only).collect()
}

fn problems(text: &str) -> Vec<String> {
    parse(text, "node-a").problems.iter().map(ToString::to_string).collect()
}

fn service(spec: &str) -> String {
    let spec: String = spec.lines().map(|line| format!("  {line}\n")).collect();
    format!("apiVersion: v1\nkind: Service\nmetadata: {{name: web, namespace: shop}}\nspec:\n{spec}")
}

#[test]
fn every_field_that_counts_is_read() {
    let text = r"
apiVersion: v1
kind: Service
metadata:
  name: web
  namespace: shop
  creationTimestamp: 2024-05-06T07:08:09Z
  annotations: {any: thing}
spec:
  type: LoadBalancer
  clusterIP: 10.96.0.10
  clusterIPs: [10.96.0.10, 'fd00::10']
  ipFamilies: [IPv4, IPv6]
  internalTrafficPolicy: Local
  externalTrafficPolicy: Local
  healthCheckNodePort: 32000
  sessionAffinity: ClientIP
  sessionAffinityConfig: {clientIP: {timeoutSeconds: 60}}
  externalIPs: [203.0.113.7]
  loadBalancerSourceRanges: [' 203.0.113.0/25 ', 2001:db8::/32]
  ports:
  - {name: http, port: 80, targetPort: http, nodePort: 30080}
  - {name: dns, port: 53, protocol: UDP}
status:
  loadBalancer:
    ingress: [{ip: 198.51.100.1}, {ip: 198.51.100.2, ipMode: Proxy}, {hostname: lb.example}]
";
    let [service]: [Service; 1] = services(text).try_into().unwrap();
    assert_eq!(service.name.as_str(), "shop/web");
    assert_eq!(service.created_secs, 1_714_979_289);
    assert_eq!(service.kind, ServiceType::LoadBalancer);
    assert_eq!(service.cluster_ip(IpFamily::V4), Some([10, 96, 0, 10].into()));
    assert_eq!(service.cluster_ip(IpFamily::V6), Some("fd00::10".parse::<IpAddr>().unwrap()));
    assert!(service.internal_local && service.external_local());
    assert_eq!((service.affinity_secs, service.health_check_node_port), (Some(60), 32_000));
    assert_eq!(service.external_ips, ["203.0.113.7".parse::<IpAddr>().unwrap()]);
    assert_eq!(service.load_balancer_ips, ["198.51.100.1".parse::<IpAddr>().unwrap()], "rule 19");
    let ranges = IpFamily::ALL.map(|family| service.source_ranges(family));
    let expected = ["203.0.113.0/25", "2001:db8::/32"].map(|net| vec![net.parse().unwrap()]);
    assert_eq!(ranges, expected, "rule 21: whitespace does not count, families do");
    let ports: Vec<_> = service.ports.iter().map(|p| (&*p.name, p.protocol, p.port, p.node_port)).collect();
    assert_eq!(ports, [("http", Protocol::Tcp, 80, 30_080), ("dns", Protocol::Udp, 53, 0)]);
}

#[test]
fn rules_1_and_10_services_that_proxies_skip_are_none() {
    for spec in [
        "clusterIP: None\nports: [{port: 80}]",
        "clusterIP: ''\nports: [{port: 80}]",
        "ports: [{port: 80}]",
        "type: ExternalName\nexternalName: example.org",
        "type: ExternalName\nclusterIP: 10.96.0.1",
    ] {
        assert_eq!(services(&service(spec)), [], "{spec}");
    }
    for value in ["other", "''"] {
        let text = service("clusterIP: 10.96.0.1")
            .replace("namespace: shop", &format!("labels: {{service.kubernetes.io/service-proxy-name: {value}}}"));
        assert_eq!(services(&text), []);
    }
}

#[test]
fn rule_12_one_name_in_two_protocols_is_two_ports() {
    let spec = "clusterIP: 10.96.0.1\nports: [{port: 53}, {port: 53, protocol: UDP}]";
    let ports: Vec<_> =
        services(&service(spec))[0].ports.iter().map(|port| (port.name.clone(), port.protocol)).collect();
    assert_eq!(ports, [("".into(), Protocol::Tcp), ("".into(), Protocol::Udp)]);
}

#[test]
fn rule_22_the_timeout_of_an_affinity_is_three_hours_by_default() {
    let secs = |more: &str| services(&service(&format!("clusterIP: 10.96.0.1\n{more}")))[0].affinity_secs;
    assert_eq!(secs("sessionAffinity: ClientIP"), Some(10_800));
    assert_eq!(secs("sessionAffinity: ClientIP\nsessionAffinityConfig: {clientIP: {timeoutSeconds: 60}}"), Some(60));
    assert_eq!(secs("sessionAffinity: None\nsessionAffinityConfig: {clientIP: {timeoutSeconds: 60}}"), None);
}

/// Each with the object that it is set in, which must come out as the one without it.
#[test]
fn rule_14_and_others_what_is_not_read_of_a_service_has_no_effect() {
    let plain = r"
apiVersion: v1
kind: Service
metadata: {name: web, namespace: shop}
spec:
  type: LoadBalancer
  clusterIP: 10.96.0.10
  clusterIPs: [10.96.0.10]
  ports: [{name: http, port: 80, protocol: TCP}]
status: {loadBalancer: {ingress: [{ip: 198.51.100.1}]}}
";
    let expected = services(plain);
    assert_eq!(expected.len(), 1);
    let spec = |line: &str| plain.replace("spec:\n", &format!("spec:\n  {line}\n"));
    for (rule, text) in [
        (14, spec("ipFamilyPolicy: RequireDualStack")),
        (15, plain.replace("protocol: TCP", "protocol: TCP, targetPort: 8080, appProtocol: kubernetes.io/h2c")),
        (15, plain.replace("protocol: TCP", "protocol: TCP, targetPort: web")),
        (
            19,
            plain.replace(
                "{ip: 198.51.100.1}",
                "{ip: 198.51.100.1, hostname: lb.example, ports: [{port: 443, protocol: TCP}]}",
            ),
        ),
        (20, spec("loadBalancerIP: 198.51.100.9")),
        (20, spec("loadBalancerClass: example.com/other")),
        (27, spec("publishNotReadyAddresses: true")),
        (28, spec("trafficDistribution: PreferSameNode")),
        (29, spec("selector: {app: web}")),
        (30, spec("allocateLoadBalancerNodePorts: false")),
        (31, plain.replace("name: web,", "deletionTimestamp: 2026-05-17T10:00:00Z, finalizers: [a/b], name: web,")),
        (59, plain.replace("name: web,", "annotations: {service.kubernetes.io/topology-mode: Auto}, name: web,")),
        (
            21,
            plain.replace(
                "name: web,",
                "annotations: {service.beta.kubernetes.io/load-balancer-source-ranges: 10.0.0.0/8}, name: web,",
            ),
        ),
        (33, plain.replace("name: web,", "labels: {any: thing}, ownerReferences: [], name: web,")),
    ] {
        assert_ne!(text, plain, "rule {rule}");
        assert_eq!(services(&text), expected, "rule {rule}: {text}");
    }
}

#[test]
fn rule_13_families_decide_which_addresses_count() {
    let ips = |spec: &str| {
        let [service]: [Service; 1] = services(&service(spec)).try_into().unwrap();
        (service.cluster_ip_v4.is_some(), service.cluster_ip_v6.is_some())
    };
    assert_eq!(ips("clusterIP: 10.96.0.1"), (true, false));
    assert_eq!(ips("clusterIP: fd00::1"), (false, true));
    assert_eq!(ips("clusterIPs: [10.96.0.1, 'fd00::1']"), (true, true));
    assert_eq!(ips("clusterIPs: [10.96.0.1, 'fd00::1']\nipFamilies: [IPv6]"), (false, true));
}

#[test]
fn rule_23_local_external_policy_needs_an_external_address() {
    let local = |spec: &str| services(&service(spec))[0].external_local();
    assert!(!local("clusterIP: 10.96.0.1\nexternalTrafficPolicy: Local"));
    assert!(local("clusterIP: 10.96.0.1\nexternalTrafficPolicy: Local\nexternalIPs: [203.0.113.1]"));
    assert!(local("type: NodePort\nclusterIP: 10.96.0.1\nexternalTrafficPolicy: Local"));
    assert!(!local("type: NodePort\nclusterIP: 10.96.0.1\nexternalTrafficPolicy: Cluster"));
}

#[test]
fn a_service_that_makes_no_sense_is_refused_with_the_field_and_what_to_do() {
    for (spec, complaint) in [
        ("clusterIP: 10.96.0.300", "spec.clusterIP: \"10.96.0.300\" is no IP address; write it like"),
        ("clusterIPs: [10.96.0.1, web]", "spec.clusterIPs[1]: \"web\" is no IP address"),
        ("clusterIP: 0.0.0.0", "spec.clusterIP: 0.0.0.0 is the unspecified address; give"),
        ("clusterIP: 10.96.0.1\nports: [{port: 0}]", "spec.ports[0].port: 0 is no port; give a number from 1 to 65535"),
        ("clusterIP: 10.96.0.1\nports: [{port: 70000}]", "spec.ports[0].port: 70000 is no port"),
        ("clusterIP: 10.96.0.1\nports: [{port: 80, nodePort: -1}]", "spec.ports[0].nodePort: -1 is no port"),
        ("clusterIP: 10.96.0.1\nports: [{port: http}]", "spec.ports[0].port: invalid type: string \"http\""),
        ("clusterIP: 10.96.0.1\nports: [{port: 80, protocol: ICMP}]", "\"ICMP\" is no protocol of a Service; give TCP"),
        ("clusterIP: 10.96.0.1\nports: [{port: 80}, {port: 81}]", "spec.ports[1]: another port has the same name"),
        ("clusterIP: 10.96.0.1\nports: [{port: 80, name: 'a:b'}]", "spec.ports[0].name: \"a:b\" is no port name"),
        ("clusterIP: 10.96.0.1\nports: 80", "spec.ports: invalid type: integer `80`"),
    ] {
        let [problem]: [String; 1] = problems(&service(spec)).try_into().unwrap();
        assert!(problem.starts_with("document 1, Service shop/web: ") && problem.contains(complaint), "{problem}");
    }
}

#[test]
fn rule_41_bad_optional_addresses_are_left_out_and_the_rest_is_used() {
    let text = service("clusterIP: 010.096.00.1\nexternalIPs: ['', nonsense, 203.000.113.007]\nports: [{port: 80}]");
    let manifest = parse(&text, "");
    let Object::Service(service) = &manifest.objects[0] else { panic!("no Service") };
    assert_eq!(service.cluster_ip_v4, Some([10, 96, 0, 1].into()));
    assert_eq!(service.external_ips, ["203.0.113.7".parse::<IpAddr>().unwrap()]);
    let [problem]: [String; 1] = problems(&text).try_into().unwrap();
    assert!(problem.contains("spec.externalIPs[1]: \"nonsense\" is no IP address"), "{problem}");
}

const SLICE: &str = r"
apiVersion: discovery.k8s.io/v1
kind: EndpointSlice
metadata:
  name: web-1
  namespace: shop
  labels: {kubernetes.io/service-name: web}
addressType: IPv4
ports:
- {name: http, port: 8080}
- {port: 53, protocol: UDP}
- {name: all}
endpoints:
- {addresses: [10.0.0.1, 10.0.0.99], nodeName: node-a}
- {addresses: [10.0.0.2], nodeName: node-b, conditions: {ready: false}}
- {addresses: [10.0.0.3], conditions: {ready: false, serving: false, terminating: true}, hints: {forZones: [{name: z}]}}
- {addresses: []}
";

#[test]
fn rules_39_to_44_slices_are_read_with_their_defaults() {
    let [slice]: [EndpointSlice; 1] = slices(SLICE).try_into().unwrap();
    assert_eq!((slice.name.as_str(), slice.service.as_str()), ("shop/web-1", "shop/web"));
    let ports: Vec<_> = slice.ports.iter().map(|p| (&*p.name, p.protocol, p.port)).collect();
    assert_eq!(ports, [("http", Protocol::Tcp, 8080), ("", Protocol::Udp, 53)], "rule 39: no number, no port");
    let endpoints: Vec<_> = slice
        .endpoints
        .iter()
        .map(|e| (e.addr.to_string(), e.ready, e.serving, e.terminating, e.local, slice.zone_hint(e, Some("z"))))
        .collect();
    assert_eq!(
        endpoints,
        [
            ("10.0.0.1".to_owned(), true, true, false, true, Hint::None),
            ("10.0.0.2".to_owned(), false, true, false, false, Hint::None),
            ("10.0.0.3".to_owned(), false, false, true, false, Hint::Here),
        ]
    );
}

#[test]
fn rule_44_hints_are_read_and_each_set_of_zones_is_kept_once() {
    let hints = [
        "forZones: [{name: a}, {name: b}]",
        "forZones: [{name: b}, {name: a}, {name: a}]",
        "forZones: [{name: c}], forNodes: [{name: node-b}]",
        "forNodes: [{name: node-b}, {name: node-a}]",
        "",
    ];
    let endpoints: String =
        (1..).zip(hints).map(|(i, hints)| format!("- {{addresses: [10.0.0.{i}], hints: {{{hints}}}}}\n")).collect();
    let text = format!("{}endpoints:\n{endpoints}", SLICE.split_once("endpoints:").unwrap().0);
    let [slice]: [EndpointSlice; 1] = slices(&text).try_into().unwrap();
    assert_eq!(slice.zone_hints.len(), 2);
    let in_zone = |zone| slice.endpoints.iter().map(|e| slice.zone_hint(e, zone)).collect::<Vec<_>>();
    use Hint::{Elsewhere, Here, None};
    assert_eq!(in_zone(Some("b")), [Here, Here, Elsewhere, None, None]);
    assert_eq!(in_zone(Option::None), [Elsewhere, Elsewhere, Elsewhere, None, None], "rule 57: a node of no zone");
    let of_node: Vec<_> = slice.endpoints.iter().map(|e| e.for_node).collect();
    assert_eq!(of_node, [None, None, Elsewhere, Here, None]);
}

#[test]
fn rule_21_ranges_of_one_family_mean_nothing_to_the_other_and_one_of_everybody_undoes_the_rest() {
    let ranges = |list: &str| {
        let text = service(&format!("clusterIP: 10.96.0.1\nloadBalancerSourceRanges: [{list}]\nports: [{{port: 80}}]"));
        let [service]: [Service; 1] = services(&text).try_into().unwrap();
        IpFamily::ALL
            .map(|family| service.source_ranges(family).iter().map(ToString::to_string).collect::<Vec<_>>().join(" "))
    };
    assert_eq!(ranges("203.000.113.9/25"), ["203.0.113.0/25", ""]);
    assert_eq!(ranges("10.0.0.0/8, 0.0.0.0/0, 'fd00::/8'"), ["", "fd00::/8"]);
    assert_eq!(ranges("10.0.0.0/8, '::/0'"), ["10.0.0.0/8", ""]);
}

#[test]
fn rule_41_a_bad_source_range_is_left_out_by_name() {
    let text = service("clusterIP: 10.96.0.1\nloadBalancerSourceRanges: ['', ' ', 10.0.0.0]\nports: [{port: 80}]");
    let [problem]: [String; 1] = problems(&text).try_into().unwrap();
    assert!(problem.contains("spec.loadBalancerSourceRanges[2]: \"10.0.0.0\" is no network"), "{problem}");
}

#[test]
fn rule_42_ready_defaults_to_true() {
    let [slice]: [EndpointSlice; 1] = slices(SLICE).try_into().unwrap();
    assert!(slice.endpoints[0].ready && slice.endpoints[0].serving && !slice.endpoints[0].terminating);
}

#[test]
fn rule_43_no_endpoint_is_local_to_a_node_without_a_name() {
    let manifest = parse(SLICE, "");
    let Object::Slice(slice) = &manifest.objects[0] else { panic!("no slice") };
    assert!(slice.endpoints.iter().all(|endpoint| !endpoint.local));
}

#[test]
fn rules_2_37_and_38_slices_that_are_not_for_us() {
    assert_eq!(slices(&SLICE.replace("IPv4", "FQDN")), []);
    assert_eq!(slices(&SLICE.replace("labels: {", "labels: {service.kubernetes.io/headless: '', ")), []);
    let orphan = problems(&SLICE.replace("kubernetes.io/service-name", "other"));
    assert!(
        orphan[0].contains("EndpointSlice shop/web-1: metadata.labels: no \"kubernetes.io/service-name\"; set it"),
        "{orphan:?}"
    );
}

#[test]
fn rule_2_the_label_of_another_proxy_on_a_slice_means_nothing() {
    let labelled = SLICE.replace("labels: {", "labels: {service.kubernetes.io/service-proxy-name: other, ");
    assert_eq!(slices(&labelled), slices(SLICE));
    assert_eq!(slices(&labelled).len(), 1);
}

#[test]
fn rule_44_and_others_what_is_not_read_of_a_slice_has_no_effect() {
    let expected = slices(SLICE);
    for (rule, text) in [
        (
            37,
            SLICE.replace(
                "  labels:",
                "  ownerReferences: [{apiVersion: v1, kind: Service, name: other, uid: u}]\n  labels:",
            ),
        ),
        (40, SLICE.replace("port: 8080", "port: 8080, appProtocol: http")),
        (43, SLICE.replace("nodeName: node-a", "nodeName: node-a, hostname: a, targetRef: {kind: Pod, name: a}")),
        (
            43,
            SLICE.replace("nodeName: node-a", "nodeName: node-a, deprecatedTopology: {kubernetes.io/hostname: node-b}"),
        ),
        (44, SLICE.replace("nodeName: node-a", "nodeName: node-a, zone: z")),
    ] {
        assert_ne!(text, SLICE, "rule {rule}");
        assert_eq!(slices(&text), expected, "rule {rule}: {text}");
    }
}

#[test]
fn a_bad_part_of_a_slice_is_left_out_by_name() {
    let text =
        SLICE.replace("10.0.0.2]", "10.0.0.2000]").replace("port: 8080", "port: 0").replace("10.0.0.1,", "'fd00::1',");
    let problems = problems(&text);
    for part in [
        "ports[0].port: 0 is no port; give a number from 1 to 65535; left out",
        "endpoints[0].addresses[0]: fd00::1 is no address of the slice's addressType",
        "endpoints[1].addresses[0]: \"10.0.0.2000\" is no IP address",
    ] {
        assert!(problems.iter().any(|problem| problem.contains(part)), "{part}: {problems:?}");
    }
    assert_eq!(slices(&text)[0].endpoints.len(), 1);
}

#[test]
fn endpoints_become_one_slice_per_subset_and_family() {
    let text = r"
apiVersion: v1
kind: Endpoints
metadata: {name: web, namespace: shop}
subsets:
- addresses: [{ip: 10.0.0.1, nodeName: node-a}, {ip: 'fd00::1'}]
  notReadyAddresses: [{ip: 10.0.0.2}]
  ports: [{name: http, port: 8080}]
- addresses: [{ip: 10.0.0.3}]
  ports: [{name: http, port: 8081}]
";
    let slices = slices(text);
    let shown: Vec<_> = slices.iter().map(|s| (s.family, s.ports[0].port, s.endpoints.len(), s.legacy)).collect();
    assert_eq!(shown, [(IpFamily::V4, 8080, 2, true), (IpFamily::V6, 8080, 1, true), (IpFamily::V4, 8081, 1, true)]);
    assert!(slices[0].endpoints[0].local && slices[0].endpoints[0].ready && !slices[0].endpoints[1].ready);
    assert!(slices.iter().all(|slice| slice.service.as_str() == "shop/web"));
}

#[test]
fn several_documents_and_lists_are_read() {
    let one = service("clusterIP: 10.96.0.1").replace("name: web", "name: one");
    let two = service("clusterIP: 10.96.0.2").replace("name: web", "name: two");
    let names = |text: &str| services(text).iter().map(|s| s.name.name().to_owned()).collect::<Vec<_>>();
    assert_eq!(names(&format!("# first\n{one}---\n{two}")), ["one", "two"]);
    assert_eq!(names(&format!("---\n{one}\n--- # two\n{two}\n---\n\n---\n# end\n...\n")), ["one", "two"]);
    let item = |text: &str| {
        text.lines().enumerate().map(|(i, l)| format!("{}{l}\n", if i == 0 { "- " } else { "  " })).collect::<String>()
    };
    assert_eq!(names(&format!("apiVersion: v1\nkind: List\nitems:\n{}{}", item(&one), item(&two))), ["one", "two"]);
    let typed = "apiVersion: v1\nkind: ServiceList\nitems: [{metadata: {name: x}, spec: {clusterIP: 10.96.0.3}}]";
    assert_eq!(names(typed), ["x"]);
    let json =
        r#"{"apiVersion": "v1", "kind": "Service", "metadata": {"name": "j"}, "spec": {"clusterIP": "10.96.0.4"}}"#;
    assert_eq!(names(json), ["j"]);
}

#[test]
fn rule_4_the_own_node_is_read_and_no_other() {
    let node = |name: &str| {
        format!(
            "apiVersion: v1\nkind: Node\nmetadata: {{name: {name}}}\nstatus: {{addresses: [{{type: InternalIP, address: 192.0.2.1}}]}}\n"
        )
    };
    let manifest = parse(&format!("{}---\n{}", node("node-b"), node("node-a")), "node-a");
    assert!(manifest.problems.is_empty(), "{:?}", manifest.problems);
    let [Object::Node(own)] = &manifest.objects[..] else { panic!("{:?}", manifest.objects) };
    assert_eq!((own.name.to_string().as_str(), &own.addresses[..]), ("node-a", &[IpAddr::from([192, 0, 2, 1])][..]));
    assert!(
        problems("apiVersion: v1\nkind: Node\nmetadata: {name: ''}")[0].starts_with("document 1, Node : metadata:")
    );
}

#[test]
fn service_cidrs_are_read() {
    let text = "apiVersion: networking.k8s.io/v1\nkind: ServiceCIDR\nmetadata: {name: kubernetes}\nspec: {cidrs: [10.96.0.0/16]}";
    let manifest = parse(text, "node-a");
    assert!(manifest.problems.is_empty(), "{:?}", manifest.problems);
    let [Object::ServiceCidr(cidr)] = &manifest.objects[..] else { panic!("{:?}", manifest.objects) };
    assert_eq!((cidr.name.to_string().as_str(), cidr.cidrs[0].to_string().as_str()), ("kubernetes", "10.96.0.0/16"));
    let old = problems(&text.replace("/v1\n", "/v1beta1\n"));
    assert!(old[0].ends_with("is not read; give networking.k8s.io/v1"), "{old:?}");
}

#[test]
fn what_is_no_yaml_is_said_with_its_line_and_the_rest_is_used() {
    let good = service("clusterIP: 10.96.0.1");
    let manifest = parse(&format!("{good}---\nkind: [Service\nspec: }}\n---\n{}", good.replace("web", "later")), "");
    assert_eq!(manifest.objects.len(), 2);
    assert!(manifest.broken);
    let [problem]: [Problem; 1] = manifest.problems.try_into().unwrap();
    let problem = problem.to_string();
    // Five lines of the first document, the separator, then the line that is wrong.
    assert!(
        problem.starts_with("document 2: no valid YAML: line 8: ") && problem.ends_with("; correct the syntax"),
        "{problem}"
    );
}

#[test]
fn what_is_not_read_is_said() {
    for (text, complaint) in [
        (
            "kind: Deployment\napiVersion: apps/v1\nmetadata: {name: d}",
            "Deployment default/d: kind Deployment is not read",
        ),
        ("apiVersion: v1\nmetadata: {name: d}", "no Kubernetes object: it has no kind; add apiVersion and kind"),
        ("just text", "no Kubernetes object"),
        (
            "kind: EndpointSlice\napiVersion: discovery.k8s.io/v1beta1\nmetadata: {name: s}",
            "is not read; give discovery.k8s.io/v1",
        ),
        ("kind: List\napiVersion: v1\nitems: 7", "items: no list; give a list of objects"),
        (
            "kind: Service\napiVersion: v1\nmetadata: {name: 'a b'}\nspec: {clusterIP: 10.96.0.1}",
            "metadata: \"a b\" is no name",
        ),
    ] {
        let [problem]: [String; 1] = problems(text).try_into().unwrap();
        assert!(problem.contains(complaint), "{problem}");
    }
}
