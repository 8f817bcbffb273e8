//! A data plane of the agent's own making: its object, loaded and filled by its planner, attached and detached here.

use std::{net::IpAddr, path::PathBuf, time::Duration};

use anyhow::{Context as _, Result};
use aya::{
    Ebpf, EbpfLoader,
    maps::{Array, HashMap, Map, MapData, ProgramArray},
    programs::{
        LinkOrder, SchedClassifier, TcAttachType,
        tc::{SchedClassifierLinkId, TcAttachOptions},
    },
};
use fairlead_lab::{Namespace, agent::mount_bpf_fs};
use fairlead_tests::counters::Counters;
use proxy_agent::{
    config::Sizes,
    dataplane::{
        Change, Dataplane,
        bpf::{Access, BpfDataplane},
        load::{self, EGRESS_STUB, INGRESS_STUB},
        pin::PinRoot,
        probe,
    },
    diff::Ledger,
    plan,
};
use proxy_common::{
    ABI_VERSION,
    abi::{Config, Device, Role, program as slot, sizes},
};

use crate::services::{self, Plan};

/// The defaults of `fairlead run`.
pub const SIZES: Sizes = Sizes {
    services: sizes::SERVICES,
    cluster_ips: sizes::CLUSTER_IPS,
    ports: sizes::PORTS,
    slots: sizes::SLOTS,
    endpoints: sizes::LIVE,
    flows: sizes::FLOWS,
    half_open: sizes::NEW,
    node_addrs: sizes::NODE_ADDRS,
    affinity: sizes::AFFINITY,
    source_ranges: sizes::SRC_RANGES,
    devices: sizes::DEVICES,
};

/// Long enough for every port to come to rest after the first filling.
const AT_REST: Duration = Duration::from_secs(3_600);

/// A device that the programs are attached to.
#[derive(Clone, Debug)]
pub struct Port {
    /// Its name.
    pub name: String,
    /// Its index.
    pub ifindex: u32,
    /// Its MAC address.
    pub mac: [u8; 6],
    /// What it is.
    pub role: Role,
    /// Its addresses of both families, if it has any.
    pub source: (Option<IpAddr>, Option<IpAddr>),
}

/// The loopback device, which plays the device of packets that never leave a test run.
pub const fn loopback() -> Port {
    Port { name: String::new(), ifindex: 1, mac: [0; 6], role: Role::Uplink, source: (None, None) }
}

/// Loaded programs and filled maps.
pub struct Plane {
    ebpf: Ebpf,
    pins: PinRoot,
    node: Namespace,
    devices: Vec<Port>,
    links: Vec<(&'static str, SchedClassifierLinkId)>,
    counters: Counters,
}

impl Plane {
    /// Loads the programs of an object, pins its maps, fills them; nothing is attached yet.
    pub fn new(object: &[u8], node: &Namespace, devices: &[Port], pins: PathBuf, plan: &Plan) -> Result<Self> {
        mount_bpf_fs()?;
        let pins = PinRoot::new(pins)?;
        pins.prepare()?;
        let ebpf = load(object, &pins)?;
        fill(&pins, plan)?;
        write_devices(&pins, devices)?;
        let counters = Counters::open(&pins)?;
        Ok(Self { ebpf, pins, node: node.clone(), devices: devices.to_vec(), links: Vec::new(), counters })
    }

    /// Where its maps are pinned.
    pub const fn pins(&self) -> &PinRoot {
        &self.pins
    }

    /// A map that is not pinned, because only some builds have it.
    pub fn take_map(&mut self, name: &str) -> Option<Map> {
        self.ebpf.take_map(name)
    }

    /// Attaches both stubs to every device, as the agent does: first at ingress, last at egress.
    pub fn attach(&mut self) -> Result<()> {
        let node = self.node.clone();
        let (ebpf, devices, links) = (&mut self.ebpf, &self.devices, &mut self.links);
        node.run(move || {
            for port in devices {
                for (name, hook, order) in [
                    (INGRESS_STUB, TcAttachType::Ingress, LinkOrder::first()),
                    (EGRESS_STUB, TcAttachType::Egress, LinkOrder::last()),
                ] {
                    let options = TcAttachOptions::TcxOrder(order);
                    let link = program(ebpf, name)?
                        .attach_with_options(&port.name, hook, options)
                        .with_context(|| format!("cannot attach {name} to {}", port.name))?;
                    links.push((name, link));
                }
            }
            Ok(())
        })?
    }

    /// Detaches everything.
    pub fn detach(&mut self) -> Result<()> {
        for (name, link) in self.links.drain(..) {
            program(&mut self.ebpf, name)?.detach(link).with_context(|| format!("cannot detach {name}"))?;
        }
        Ok(())
    }

    /// What its programs counted.
    pub const fn counters(&self) -> &Counters {
        &self.counters
    }
}

impl std::fmt::Debug for Plane {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Plane").field("pins", &self.pins).field("devices", &self.devices).finish_non_exhaustive()
    }
}

impl Drop for Plane {
    fn drop(&mut self) {
        self.detach().ok();
        std::fs::remove_dir_all(self.pins.path()).ok();
    }
}

/// Loads maps and programs as the agent does, but from any object.
fn load(object: &[u8], pins: &PinRoot) -> Result<Ebpf> {
    let features = probe::features().context("cannot find out what this kernel can do")?;
    anyhow::ensure!(features.tcx, "the bench attaches and detaches by tcx links, which this kernel lacks (6.6)");
    let shapes = load::sized_shapes(&SIZES, true)?;
    let mut loader = EbpfLoader::new();
    for (name, shape) in &shapes {
        loader.map_max_entries(name, shape.max_entries);
        loader.map_pin_path(name, pins.map(name));
    }
    let mut ebpf = loader.load(object).context("cannot create the maps")?;
    let mut config: Array<_, Config> = ebpf.map_mut("CONFIG").context("no map CONFIG")?.try_into()?;
    let mut settings = config.get(&0, 0)?;
    // One seed for all runs: the same flows choose the same endpoints.
    (settings.abi_version, settings.seed, settings.flags) = (ABI_VERSION, 1, features.flags());
    settings.new_timeout_secs = Config::NEW_TIMEOUT_SECS;
    // What a node with the kernel's usual ip_local_port_range leaves to masquerade.
    (settings.snat_low_first, settings.snat_low_count) = (1_024, 28_976);
    (settings.snat_high_first, settings.snat_high_count) = (61_000, 4_536);
    // What a reject costs, not how often it is allowed.
    settings.reject_per_sec = u32::MAX;
    config.set(0, settings, 0)?;
    for name in slot::ALL.map(|(name, _)| name).into_iter().chain([INGRESS_STUB, EGRESS_STUB]) {
        program(&mut ebpf, name)?.load().with_context(|| format!("cannot load program {name}"))?;
    }
    let mut slots: ProgramArray<_> = ebpf.take_map("PROGRAMS").context("no map PROGRAMS")?.try_into()?;
    for (name, slot) in slot::ALL {
        slots.set(slot, program(&mut ebpf, name)?.fd()?, 0)?;
    }
    Ok(ebpf)
}

fn program<'a>(ebpf: &'a mut Ebpf, name: &str) -> Result<&'a mut SchedClassifier> {
    let program = ebpf.program_mut(name).with_context(|| format!("the object has no program {name}"))?;
    Ok(program.try_into()?)
}

/// Fills the maps with what the planner wants.
fn fill(pins: &PinRoot, services: &Plan) -> Result<()> {
    let mut maps = BpfDataplane::open(pins, Access::Write)?;
    let mut ledger = Ledger::restore(&maps.dump()?, Duration::ZERO);
    let index = services::index(services);
    let mut names: Vec<_> = index.service_names().cloned().collect();
    names.sort();
    if let Some(addrs) = index.node_addrs() {
        let change = ledger.change_node(addrs);
        carry_out(&mut maps, &mut ledger, &change)?;
        ledger.finish(&change, None);
    }
    for name in names {
        let desired = plan::desired(&index, &name, true);
        let change = ledger.change(&desired, Duration::ZERO)?;
        carry_out(&mut maps, &mut ledger, &change)?;
        ledger.finish(&change, Some(&desired));
        ledger.release(&change.frees);
    }
    for change in ledger.settle(AT_REST) {
        carry_out(&mut maps, &mut ledger, &change)?;
        ledger.finish(&change, None);
        ledger.release(&change.frees);
    }
    Ok(())
}

/// All writes of a change at once: nothing reads these maps yet, so no grace period is due.
fn carry_out(maps: &mut BpfDataplane, ledger: &mut Ledger, change: &Change) -> Result<()> {
    for op in change.prepare.iter().chain(&change.commit).chain(&change.retire) {
        maps.write(op)?;
        ledger.record(op);
    }
    Ok(())
}

fn write_devices(pins: &PinRoot, devices: &[Port]) -> Result<()> {
    let data = MapData::from_pin(pins.map("DEVICES")).context("cannot open DEVICES")?;
    let mut map: HashMap<_, u32, Device> = HashMap::try_from(Map::HashMap(data)).context("DEVICES is no hash map")?;
    for port in devices {
        let v4 = match port.source.0 {
            Some(IpAddr::V4(addr)) => addr,
            _ => std::net::Ipv4Addr::UNSPECIFIED,
        };
        let v6 = match port.source.1 {
            Some(IpAddr::V6(addr)) => addr,
            _ => std::net::Ipv6Addr::UNSPECIFIED,
        };
        let device = Device {
            role: port.role as u8,
            flags: 0,
            mac: port.mac,
            master: 0,
            master_mac: [0; 6],
            _pad: 0,
            source_v4: v4.into(),
            source_v6: v6.into(),
            reply_mark: 0,
            ifindex: port.ifindex,
        };
        map.insert(port.ifindex, device, 0).with_context(|| format!("cannot tell the programs of {}", port.name))?;
    }
    Ok(())
}
