//! One node: its devices in a namespace, the loaded programs, and maps that the agent's own planner writes.

use std::collections::BTreeMap;
use std::net::IpAddr;
use std::path::PathBuf;
use std::sync::LazyLock;
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::Duration;

use aya::{Ebpf, EbpfLoader};
use proxy_agent::dataplane::bpf::{Access, BpfDataplane};
use proxy_agent::dataplane::pin::PinRoot;
use proxy_agent::dataplane::{Change, Dataplane as _, load, probe};
use proxy_agent::diff::{Ledger, QUIET};
use proxy_agent::index::{self, Event, Index};
use proxy_agent::k8s::manifest;
use proxy_agent::model::{IpFamily, ObjectName, PortKey, Protocol};
use proxy_agent::plan;
use proxy_common::ABI_VERSION;
use proxy_common::abi::{self, Config, NodeAddr, Role};

use super::build::Packet;
use super::kernel::Meta;
use super::maps::{FromIp as _, Maps};
use super::netns::NetNs;
use super::programs::Programs;
use super::ran::{Hook, Ran};
use super::reuse::{self, Kind, Loaded};
use super::service::Service;
use super::world::{self, BRIDGE, Device, LOOPBACK, NODE_NAME, POD1, POD2, PORT1, PORT2, UPLINK};

/// Names the object to test instead of the one that belongs to the agent.
const OBJECT_VARIABLE: &str = "FAIRLEAD_EBPF_OBJECT";

/// Names the fault that the object is to have (`proxy-ebpf/src/mutants.rs`).
const FAULT_VARIABLE: &str = "FAIRLEAD_MUTANT";

static OBJECT: LazyLock<Vec<u8>> = LazyLock::new(|| match std::env::var_os(OBJECT_VARIABLE) {
    Some(path) => {
        let path = PathBuf::from(path);
        std::fs::read(&path).unwrap_or_else(|e| panic!("{OBJECT_VARIABLE}: cannot read {}: {e}", path.display()))
    }
    None => load::OBJECT.to_vec(),
});

/// What a node is started with.
#[derive(Clone, Copy, Debug)]
pub struct Settings {
    /// Entries of `FLOWS_V4/6`, each.
    pub flows: u32,
    /// Entries of `NEW_V4/6`, each.
    pub half_open: u32,
    /// kube-proxy's rules stand.
    pub kube_proxy: bool,
    /// Answers per second.
    pub rejects_per_sec: u32,
    /// The bits of `skb->mark` that are ours.
    pub reply_mark: u32,
    /// Source ports for masquerade, from 61000 upwards; 0: as by default.
    pub source_ports: u16,
}

impl Default for Settings {
    fn default() -> Self {
        Self {
            flows: 1024,
            half_open: 1024,
            kube_proxy: false,
            rejects_per_sec: Config::REJECT_PER_SEC,
            reply_mark: 0,
            source_ports: 0,
        }
    }
}

/// A node.
pub struct Node {
    // Before the namespace: fields drop in order, and nothing may outlive it. `None` once it is given back.
    kernel: Option<(BpfDataplane, Programs)>,
    /// The loaded maps.
    pub maps: Maps,
    /// `None` if no later test is to have what it has loaded.
    kind: Option<Kind>,
    marks_replies: bool,
    index: Index,
    ledger: Ledger,
    now: Duration,
    netns: NetNs,
}

impl Node {
    /// A node of the test world, with nothing to serve.
    pub fn start() -> Self {
        Self::start_with(Settings::default())
    }

    /// The same with settings.
    pub fn start_with(settings: Settings) -> Self {
        let netns = NetNs::enter();
        let default = Settings::default();
        let usual = (settings.flows, settings.half_open) == (default.flows, default.half_open);
        let kind = usual.then_some(Kind { reply_mark: settings.reply_mark });
        let loaded = kind.and_then(reuse::take).unwrap_or_else(|| load_object(settings));
        Self::on(loaded, settings, kind, netns)
    }

    /// A new node on the same loaded object, emptied.
    pub fn start_again(mut self) -> Self {
        let loaded = self.take_loaded();
        loaded.empty().expect("the maps can be emptied");
        // One namespace of the thread after the other.
        drop(self);
        Self::on(loaded, Settings::default(), None, NetNs::enter())
    }

    fn on(loaded: Loaded, settings: Settings, kind: Option<Kind>, netns: NetNs) -> Self {
        let Loaded { mut dataplane, programs, mut maps } = loaded;
        let snapshot = dataplane.dump().expect("new maps can be read");
        let now = Duration::from_secs(1000);
        let ledger = Ledger::restore(&snapshot, now);
        configure(&mut maps, settings);
        describe_devices(&mut maps);
        let index = Index::default();
        let kernel = Some((dataplane, programs));
        let marks_replies = settings.reply_mark != 0;
        let mut node = Self { kernel, maps, kind, marks_replies, index, ledger, now, netns };
        for kind in [index::Kind::Service, index::Kind::EndpointSlice] {
            node.event(Event::Init(kind));
            node.event(Event::InitDone(kind));
        }
        node.event(Event::NodeAddrs(own_addresses()));
        node
    }

    /// A node that serves this.
    pub fn serving(services: &[&Service]) -> Self {
        let mut node = Self::start();
        services.iter().for_each(|service| node.apply(service));
        node
    }

    /// The Service is new, or has become this.
    pub fn apply(&mut self, service: &Service) {
        let yaml = service.yaml();
        let manifest = manifest::parse(&yaml, NODE_NAME);
        let problems: Vec<_> = manifest.problems.iter().map(ToString::to_string).collect();
        assert!(problems.is_empty(), "the manifest has problems: {problems:?}\n{yaml}");
        for object in manifest.objects {
            self.event(Event::Apply(object));
        }
    }

    /// The Service is gone, with its slices.
    pub fn delete(&mut self, service: &Service) {
        for object in manifest::parse(&service.yaml(), NODE_NAME).objects {
            let kind = object.kind();
            self.event(Event::Delete(kind, object.name().clone()));
        }
    }

    pub(super) const fn marks_replies(&self) -> bool {
        self.marks_replies
    }

    /// What the planner says of a Service in namespace `default`.
    pub fn plan(&self, service: &str) -> plan::Desired {
        plan::desired(&self.index, &ObjectName::new("default", service), true)
    }

    /// So much time passes that no flow is half open under an earlier run any more.
    pub fn come_to_rest(&mut self) {
        self.now += QUIET + Duration::from_secs(1);
        for change in self.ledger.settle(self.now) {
            self.carry_out(&change, None);
        }
    }

    /// What the maps hold: every element of every map that can change.
    pub fn contents(&self) -> BTreeMap<String, reuse::Elements> {
        reuse::contents(&self.maps).expect("the maps can be read")
    }

    fn take_loaded(&mut self) -> Loaded {
        let (dataplane, programs) = self.kernel.take().expect("it is given back once");
        Loaded { dataplane, programs, maps: std::mem::take(&mut self.maps) }
    }

    fn kernel(&mut self) -> &mut (BpfDataplane, Programs) {
        self.kernel.as_mut().expect(NOT_GIVEN_BACK)
    }

    fn programs(&self) -> &Programs {
        &self.kernel.as_ref().expect(NOT_GIVEN_BACK).1
    }

    fn event(&mut self, event: Event) {
        let changed = self.index.apply(event);
        for name in changed.services {
            let desired = plan::desired(&self.index, &name, true);
            let change = self.ledger.change(&desired, self.now).expect("the maps have room");
            self.carry_out(&change, Some(&desired));
        }
        if changed.node {
            let addrs = self.index.node_addrs().cloned().unwrap_or_default();
            let change = self.ledger.change_node(&addrs);
            self.carry_out(&change, None);
        }
    }

    /// As the agent does it: prepare, commit, a grace period, retire.
    fn carry_out(&mut self, change: &Change, desired: Option<&plan::Desired>) {
        let mut write = |ops: &[proxy_agent::dataplane::MapOp]| {
            for op in ops {
                self.kernel().0.write(op).unwrap_or_else(|e| panic!("{op:?}: {e}"));
                self.ledger.record(op);
            }
        };
        write(&change.prepare);
        write(&change.commit);
        // No packet is under way: there is nobody to wait for.
        write(&change.retire);
        self.ledger.finish(change, desired);
        self.ledger.release(&change.frees);
    }

    /// The port id of a Service port, in namespace `default`.
    pub fn port_id(&mut self, service: &str, protocol: Protocol, port: u16, family: IpFamily) -> u32 {
        let wanted = PortKey {
            service: ObjectName::new("default", service),
            port: format!("{}-{port}", protocol.to_string().to_lowercase()).into(),
            protocol,
            family,
        };
        let names = self.kernel().0.dump().expect("the maps can be read").names;
        let found = names.iter().find(|(_, key)| **key == wanted);
        *found.unwrap_or_else(|| panic!("no port {wanted:?} in {names:?}")).0
    }

    /// Replies to what came in by a device are to have this mark.
    pub fn mark_replies_by(&mut self, device: Device, reply_mark: u32) {
        self.maps.put_device(&abi::Device { reply_mark, ..described(device) });
    }

    /// The node loses its addresses on a device, and the kernel names none either.
    pub fn without_sources(&mut self, device: Device) {
        let (source_v4, source_v6) = Default::default();
        self.maps.put_device(&abi::Device { source_v4, source_v6, ..described(device) });
        self.maps.configure(|config| config.flags &= !Config::FIB_SOURCE);
    }

    /// Somebody else's programs stand at a device's hooks.
    pub fn foreign(&mut self, device: Device) {
        let known = described(device);
        self.maps.put_device(&abi::Device { flags: known.flags | abi::Device::FOREIGN, ..known });
    }

    /// The agent found this address first on a device.
    pub fn first_source(&mut self, device: Device, first: fn(IpFamily) -> IpAddr) {
        let source_v4 = proxy_common::Addr4::from_ip(first(IpFamily::V4));
        let source_v6 = proxy_common::Addr6::from_ip(first(IpFamily::V6));
        self.maps.put_device(&abi::Device { source_v4, source_v6, ..described(device) });
    }

    /// Loads every program, whether or not a packet needs it.
    pub fn load_all(&self) {
        self.programs().load_all();
    }

    /// Runs commands of `ip` on the node.
    pub fn ip(&self, lines: &str) {
        self.netns.ip(lines);
    }

    /// A packet arrives at a device.
    pub fn arrives(&self, device: Device, packet: &Packet) -> Ran<'_> {
        self.arrives_as(device, &packet.bytes())
    }

    /// Bytes arrive at a device.
    pub fn arrives_as(&self, device: Device, frame: &[u8]) -> Ran<'_> {
        self.run(Hook::Ingress, format!("arrives at {}", device.name), frame, entering(device))
    }

    /// A packet to which somebody else gave a `tc_index` arrives at a device.
    pub fn arrives_marked(&self, device: Device, tc_index: u16, packet: &Packet) -> Ran<'_> {
        let meta = Meta { tc_index, ..entering(device) };
        self.run(Hook::Ingress, format!("arrives at {} with tc_index {tc_index}", device.name), &packet.bytes(), meta)
    }

    /// A packet that has a mark arrives at a device.
    pub fn arrives_with_mark(&self, device: Device, mark: u32, packet: &Packet) -> Ran<'_> {
        let meta = Meta { mark, ..entering(device) };
        self.run(Hook::Ingress, format!("arrives at {} with mark {mark:#x}", device.name), &packet.bytes(), meta)
    }

    /// A packet with a VLAN tag beside its bytes arrives at a device.
    pub fn arrives_tagged(&self, device: Device, vlan: u16, packet: &Packet) -> Ran<'_> {
        let meta = Meta { vlan, ..entering(device) };
        self.run(Hook::Ingress, format!("arrives at {} in VLAN {vlan}", device.name), &packet.bytes(), meta)
    }

    /// A packet that stands for several segments of this size arrives at a device.
    pub fn arrives_large(&self, device: Device, gso_size: u32, packet: &Packet) -> Ran<'_> {
        let gso_segs = (packet.payload.len() as u32).div_ceil(gso_size);
        let meta = Meta { gso_size, gso_segs, ..entering(device) };
        self.run(Hook::Ingress, format!("arrives at {} in segments", device.name), &packet.bytes(), meta)
    }

    /// A forwarded packet that ingress left alone leaves by a device.
    pub fn leaves(&self, device: Device, packet: &Packet) -> Ran<'_> {
        self.leaves_marked(device, 0, packet)
    }

    /// A forwarded packet, of which ingress said this, leaves by a device.
    pub fn leaves_marked(&self, device: Device, tc_index: u16, packet: &Packet) -> Ran<'_> {
        // Where it came in does not matter, only that it did.
        let meta = Meta { ifindex: device.ifindex, ingress_ifindex: UPLINK.ifindex, tc_index, ..Meta::default() };
        self.run(Hook::Egress, format!("leaves by {} with tc_index {tc_index}", device.name), &packet.bytes(), meta)
    }

    /// A packet of a process of the node leaves by a device.
    pub fn sends(&self, device: Device, packet: &Packet) -> Ran<'_> {
        let meta = Meta { ifindex: device.ifindex, ..Meta::default() };
        self.run(Hook::Egress, format!("is sent by the node through {}", device.name), &packet.bytes(), meta)
    }

    fn run(&self, hook: Hook, what: String, frame: &[u8], meta: Meta) -> Ran<'_> {
        let before = self.maps.counters();
        let left = self.programs().entry(hook, frame).run(frame, meta);
        Ran::new(self, hook, what, frame.to_vec(), meta, left, &before)
    }
}

const NOT_GIVEN_BACK: &str = "the node is in use";

impl Drop for Node {
    fn drop(&mut self) {
        // A test that fails may have left anything.
        if let Some(kind) = self.kind
            && self.kernel.is_some()
            && !std::thread::panicking()
        {
            reuse::give_back(kind, self.take_loaded());
        }
    }
}

fn entering(device: Device) -> Meta {
    Meta { ifindex: device.ifindex, ingress_ifindex: device.ifindex, ..Meta::default() }
}

fn load_object(settings: Settings) -> Loaded {
    let mut loader = EbpfLoader::new();
    for map in ["PORTS", "PORT_STATS", "NAMES", "SLOTS_V4", "SLOTS_V6", "LIVE"] {
        loader.map_max_entries(map, 256);
    }
    for (v4, v6, entries) in [("FLOWS_V4", "FLOWS_V6", settings.flows), ("NEW_V4", "NEW_V6", settings.half_open)] {
        loader.map_max_entries(v4, entries).map_max_entries(v6, entries);
    }
    // Only objects that have faults to choose from have the global.
    let fault = std::env::var(FAULT_VARIABLE).map_or(0, |name| proxy_common::mutant::id(&name));
    loader.override_global("MUTANT", &fault, false).override_global("REPLY_MARK", &settings.reply_mark, true);
    let mut ebpf =
        loader.load(&OBJECT).unwrap_or_else(|e| panic!("cannot load the object (the packet tier needs root): {e}"));
    let dataplane = open_dataplane(&ebpf);
    let names: Vec<String> = ebpf.maps().map(|(name, _)| name.to_owned()).collect();
    let mut maps = Maps::new(names.into_iter().filter_map(|name| Some((name.clone(), ebpf.take_map(&name)?))));
    let programs = Programs::new(ebpf, maps.take_programs());
    Loaded { dataplane, programs, maps }
}

/// Pins for a moment.
struct Pins(PinRoot);

impl Drop for Pins {
    fn drop(&mut self) {
        // What cannot be removed shows in the next `ls`; a test that fails already must not fail twice.
        std::fs::remove_dir_all(self.0.path()).ok();
    }
}

/// The agent's own view of the maps. It opens pins, which are taken away again at once.
fn open_dataplane(ebpf: &Ebpf) -> BpfDataplane {
    static COUNT: AtomicU32 = AtomicU32::new(0);
    let number = COUNT.fetch_add(1, Ordering::Relaxed);
    let root = PathBuf::from(format!("/sys/fs/bpf/fairlead-packets-{}-{number}", std::process::id()));
    let pins = Pins(PinRoot::new(root).expect("an absolute path"));
    pins.0.prepare().expect("the BPF file system takes pins");
    // The compiler's own sections have dots in their names, which pins cannot have.
    for (name, map) in ebpf.maps().filter(|(name, _)| !name.starts_with('.')) {
        map.pin(pins.0.map(name)).unwrap_or_else(|e| panic!("cannot pin {name}: {e}"));
    }
    BpfDataplane::open(&pins.0, Access::Write).expect("the agent opens its own maps")
}

fn configure(maps: &mut Maps, settings: Settings) {
    let features = probe::features().expect("the kernel says what it can do");
    let own = if settings.kube_proxy { Config::KUBE_PROXY } else { 0 } | Config::LOCAL_DEVICES;
    let few = settings.source_ports;
    maps.configure(|config| {
        (config.abi_version, config.flags) = (ABI_VERSION, features.flags() | own);
        // Any will do; a fixed one makes a failure come again.
        config.seed = 0x5eed;
        config.new_timeout_secs = Config::NEW_TIMEOUT_SECS;
        config.reject_per_sec = settings.rejects_per_sec;
        // As with the default ip_local_port_range of 32768–60999 and NodePorts from 30000.
        (config.snat_low_first, config.snat_low_count) = if few == 0 { (1024, 28_976) } else { (0, 0) };
        (config.snat_high_first, config.snat_high_count) = if few == 0 { (61_000, 4_536) } else { (61_000, few) };
    });
}

/// What the agent knows of a device of the test world.
fn described(device: Device) -> abi::Device {
    let (role, master) = match device {
        LOOPBACK => (Role::Loopback, None),
        UPLINK => (Role::Uplink, None),
        POD1 | POD2 => (Role::Pod, None),
        PORT1 | PORT2 => (Role::BridgePort, Some(BRIDGE)),
        _ => (Role::Bridge, None),
    };
    let source = if device == BRIDGE || master.is_some() { world::bridge } else { world::node };
    abi::Device {
        role: role as u8,
        flags: if matches!(role, Role::Pod | Role::BridgePort) { abi::Device::PODS } else { 0 },
        mac: device.mac,
        master: master.map_or(0, |m| m.ifindex),
        master_mac: master.map_or([0; 6], |m| m.mac),
        _pad: 0,
        source_v4: proxy_common::Addr4::from_ip(source(IpFamily::V4)),
        source_v6: proxy_common::Addr6::from_ip(source(IpFamily::V6)),
        reply_mark: 0,
        ifindex: device.ifindex,
    }
}

fn describe_devices(maps: &mut Maps) {
    for device in [LOOPBACK, UPLINK, POD1, POD2, BRIDGE, PORT1, PORT2] {
        maps.put_device(&described(device));
    }
}

/// As with `--nodeport-addresses=primary`.
fn own_addresses() -> BTreeMap<IpAddr, u32> {
    IpFamily::ALL
        .into_iter()
        .flat_map(|family| {
            [(world::node(family), NodeAddr::LOCAL | NodeAddr::NODE_PORTS), (world::bridge(family), NodeAddr::LOCAL)]
        })
        .collect()
}
