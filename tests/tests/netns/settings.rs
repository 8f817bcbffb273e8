//! What programs read in `CONFIG` and of devices: who is a pod of this node, and which source ports masquerade may take.

use std::path::Path;

use anyhow::{Context as _, Result, ensure};
use aya::maps::{Array, Map, MapData};
use fairlead_lab::{Agent, AgentOptions, server::wait_until};
use fairlead_tests::listed;
use proxy_common::abi::Config;

use crate::cell::{Cell, Cluster, PATIENCE};

fn cluster(args: &[&str]) -> Cluster {
    let args = args.iter().map(Into::into).collect();
    Cluster::own(Cell::named("bridge_plain"), AgentOptions { args, ..AgentOptions::default() })
}

fn config(agent: &Agent) -> Result<Config> {
    let data = MapData::from_pin(agent.pin("CONFIG").context("no CONFIG among the pins")?)?;
    Ok(Array::<_, Config>::try_from(Map::Array(data))?.get(&0, 0)?)
}

fn until(what: &str, agent: &Agent, wanted: impl Fn(&Config) -> bool) -> Result<()> {
    let seen = wait_until(PATIENCE, || config(agent).is_ok_and(|config| wanted(&config)));
    ensure!(seen, "{what}: not within {PATIENCE:?}; CONFIG says {:?}\n{}", config(agent)?, agent.log_text());
    Ok(())
}

fn pod_devices(agent: &Agent) -> Result<Vec<String>> {
    let rows = listed::rows(agent, "devices")?.into_iter().filter(|row| row["pods"] == true);
    Ok(rows.filter_map(|row| Some(row["name"].as_str()?.to_owned())).collect())
}

/// The kernel has left masquerade nothing: some ports are reserved for it, listed, and given back.
#[test]
fn source_ports_are_reserved_and_given_back() {
    let cluster = cluster(&[]);
    let node = &cluster.lab.node.ns;
    let mut agent = cluster.agent.lock().unwrap();
    let ports = |config: &Config| {
        let Config { snat_low_first, snat_low_count, snat_high_first, snat_high_count, .. } = *config;
        [(snat_low_first, snat_low_count), (snat_high_first, snat_high_count)]
    };
    until("the default", &agent, |config| ports(config) == [(1_024, 28_976), (61_000, 4_536)]).unwrap();

    let accept_local = || node.output("sysctl", &["-n", "net.ipv4.conf.lo.accept_local"]).unwrap().trim().to_owned();
    assert_eq!(accept_local(), "1");
    node.sysctl("net.ipv4.ip_local_reserved_ports", "8080,61005").unwrap();
    node.sysctl("net.ipv4.ip_local_port_range", "1024 65535").unwrap();
    until("reserved ports", &agent, |config| ports(config) == [(61_000, 4_536), (0, 0)]).unwrap();
    let reserved = || node.output("sysctl", &["-n", "net.ipv4.ip_local_reserved_ports"]).unwrap().trim().to_owned();
    assert_eq!(reserved(), "8080,61000-65535");
    let line = |text: &str, what: &str| text.lines().any(|line| line.contains(what));
    let check = agent.fairlead(&["check"]).unwrap();
    assert!(line(&check, "net.ipv4.ip_local_reserved_ports was set by Fairlead: 61000-65535 added"), "{check}");
    assert!(line(&check, "net.ipv4.conf.lo.accept_local was set by Fairlead: 1 in place of 0"), "{check}");
    assert!(line(&check, "masquerade has 4536 source ports: 61000-65535"), "{check}");

    agent.stop().unwrap();
    let said = agent.fairlead(&["cleanup"]).unwrap();
    assert!(line(&said, "took 61000-65535 out of net.ipv4.ip_local_reserved_ports again"), "{said}");
    assert!(line(&said, "set net.ipv4.conf.lo.accept_local from 1 to 0 again"), "{said}");
    assert_eq!((reserved().as_str(), accept_local().as_str()), ("8080,61005", "0"));
    let left = Path::new("/run/fairlead").join(agent.pin_path.strip_prefix("/").unwrap());
    assert!(!left.exists(), "cleanup left {}", left.display());
}

/// Left alone, it is said what is missing, and what there is is used.
#[test]
fn without_manage_sysctls_nothing_is_set_and_all_is_said() {
    let cluster = cluster(&["--manage-sysctls=false", "--service-node-port-range=31000-31999"]);
    let node = &cluster.lab.node.ns;
    let agent = cluster.agent.lock().unwrap();
    node.sysctl("net.ipv4.ip_local_port_range", "1100 65000").unwrap();
    let few =
        |config: &Config| (config.snat_low_first, config.snat_low_count, config.snat_high_count) == (1_024, 76, 535);
    until("what is left", &agent, few).unwrap();
    for (entry, value) in [("net.ipv4.ip_local_reserved_ports", ""), ("net.ipv4.conf.lo.accept_local", "0")] {
        assert_eq!(node.output("sysctl", &["-n", entry]).unwrap().trim(), value);
    }
    let warning = "net.ipv4.conf.lo.accept_local is 0: processes of this node get no answer";
    assert!(agent.log_text().contains(warning), "{}", agent.log_text());
    let said = "masquerade has 611 source ports (1024-1099 and 65001-65535), 4096 are needed";
    assert!(agent.log_text().contains(said), "{}", agent.log_text());
    let shown = wait_until(PATIENCE, || agent.fairlead(&["services"]).is_ok_and(|text| text.contains(said)));
    assert!(shown, "{}", agent.fairlead(&["services"]).unwrap());
    node.sysctl("net.ipv4.ip_local_port_range", "32768 60999").unwrap();
    until("enough again", &agent, |config| config.snat_low_count == 29_976).unwrap();
    let gone = wait_until(PATIENCE, || agent.fairlead(&["services"]).is_ok_and(|text| !text.contains("masquerade")));
    assert!(gone, "{}", agent.fairlead(&["services"]).unwrap());
}

/// The Node's own networks, as soon as it has some; a restarted agent knows them from the start.
#[test]
fn rule_71_node_cidr_follows_the_node() {
    let cluster = cluster(&["--detect-local-mode=node-cidr", "--masquerade-all"]);
    let mut agent = cluster.agent.lock().unwrap();
    const BOTH: u32 = Config::LOCAL_CIDR_V4 | Config::LOCAL_CIDR_V6;
    until("no network yet", &agent, |config| config.flags & (BOTH | Config::LOCAL_DEVICES) == 0).unwrap();
    assert_ne!(config(&agent).unwrap().flags & Config::MASQUERADE_ALL, 0);
    let node = |cidrs: &str| {
        let text = format!("apiVersion: v1\nkind: Node\nmetadata: {{name: node-a}}\nspec: {{podCIDRs: [{cidrs}]}}\n");
        cluster.manifests.write("own-node", &text).unwrap();
    };
    node("10.244.7.9/24, 'fd00:7::/64', 10.9.0.0/16");
    let is = |config: &Config, third: u8| {
        config.local_v4.octets == [10, 244, third, 0] && config.local_mask_v4.octets == [255, 255, 255, 0]
    };
    let six = |config: &Config| {
        config.local_v6.octets[..4] == [0xfd, 0, 0, 7] && config.local_mask_v6.octets[7..9] == [255, 0]
    };
    until("its networks", &agent, |config| config.flags & BOTH == BOTH && is(config, 7) && six(config)).unwrap();
    assert!(pod_devices(&agent).unwrap().is_empty());
    agent.kill();
    cluster.manifests.remove("own-node").unwrap();
    agent.restart(&cluster.lab).unwrap();
    assert!(
        config(&agent).is_ok_and(|config| config.flags & BOTH == BOTH && is(&config, 7)),
        "they hold until others come"
    );
    node("10.244.8.0/24");
    until("fewer networks", &agent, |config| config.flags & BOTH == Config::LOCAL_CIDR_V4 && is(config, 8)).unwrap();
}

/// Devices of pods, told by role, by bridge and by name.
#[test]
fn rule_71_devices_of_pods_are_marked() {
    let cluster = cluster(&[]);
    let mut agent = cluster.agent.lock().unwrap();
    let (client, bridge) = (&cluster.lab.client.node_device, "cni0");
    // Devices may be described a moment after the agent is up.
    let are = |agent: &Agent, (pods, also_bridge): (bool, bool)| {
        wait_until(PATIENCE, || {
            let found = pod_devices(agent).unwrap_or_default();
            found.contains(client) == pods && found.iter().any(|name| name == bridge) == also_bridge
        })
    };
    assert_eq!(config(&agent).unwrap().flags & Config::LOCAL_DEVICES, Config::LOCAL_DEVICES);
    assert!(are(&agent, (true, false)), "{:?}", pod_devices(&agent));
    for (args, pods, also_bridge) in [
        ("--detect-local-mode=bridge --pod-bridge-interface=cni0", true, true),
        ("--detect-local-mode=prefix --pod-interface-name-prefix=eth", false, false),
        ("--detect-local-mode=none", false, false),
    ] {
        agent.stop().unwrap();
        agent.options.args = args.split(' ').map(Into::into).collect();
        agent.restart(&cluster.lab).unwrap();
        assert!(are(&agent, (pods, also_bridge)), "{args}: {:?}", pod_devices(&agent));
        let flag = config(&agent).unwrap().flags & Config::LOCAL_DEVICES != 0;
        assert_eq!(flag, !args.contains("none"), "{args}");
    }
}
