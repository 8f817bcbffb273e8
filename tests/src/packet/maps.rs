//! The loaded maps, typed: what a test looks at after a packet, and the few things that it forces.

use std::collections::BTreeMap;
use std::fmt::Write as _;
use std::net::IpAddr;
use std::os::fd::AsFd;

use aya::maps::{Array, HashMap, LpmTrie, Map, MapData, PerCpuArray, lpm_trie};
use proxy_common::abi::{Affinity, AffinityKey, Config, Device, Flow, FlowKey, PortStats, Slot};
use proxy_common::{Addr4, Addr6, Address, Family, Outcome, V4, V6};

/// The maps of a loaded object.
#[derive(Debug, Default)]
pub struct Maps(BTreeMap<String, Map>);

/// A map of flows, confirmed or half open.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Table {
    /// `FLOWS_V4/6`.
    Confirmed,
    /// `NEW_V4/6`.
    HalfOpen,
}

impl Table {
    const fn map<F: Family>(self) -> &'static str {
        match (self, F::IS_V6) {
            (Self::Confirmed, false) => "FLOWS_V4",
            (Self::Confirmed, true) => "FLOWS_V6",
            (Self::HalfOpen, false) => "NEW_V4",
            (Self::HalfOpen, true) => "NEW_V6",
        }
    }
}

fn wrong(what: &str, error: impl std::fmt::Display) -> ! {
    panic!("{what}: {error}")
}

impl Maps {
    /// Of an object.
    pub(super) fn new(maps: impl Iterator<Item = (String, Map)>) -> Self {
        Self(maps.collect())
    }

    /// The array that the stubs jump through.
    pub(super) fn take_programs(&mut self) -> Map {
        self.0.remove("PROGRAMS").expect("the object has PROGRAMS")
    }

    /// All of them, by name.
    pub(super) fn all(&self) -> impl Iterator<Item = (&str, &Map)> {
        self.0.iter().map(|(name, map)| (name.as_str(), map))
    }

    fn map(&self, name: &str) -> &Map {
        self.0.get(name).unwrap_or_else(|| panic!("the object has no map {name}"))
    }

    fn map_mut(&mut self, name: &str) -> &mut Map {
        self.0.get_mut(name).unwrap_or_else(|| panic!("the object has no map {name}"))
    }

    /// `CONFIG[0]`.
    pub fn config(&self) -> Config {
        let map: Array<_, Config> = self.map("CONFIG").try_into().unwrap_or_else(|e| wrong("CONFIG", e));
        map.get(&0, 0).unwrap_or_else(|e| wrong("CONFIG", e))
    }

    /// Changes `CONFIG[0]`.
    pub fn configure(&mut self, change: impl FnOnce(&mut Config)) {
        let mut config = self.config();
        change(&mut config);
        let mut map: Array<_, Config> = self.map_mut("CONFIG").try_into().unwrap_or_else(|e| wrong("CONFIG", e));
        map.set(0, config, 0).unwrap_or_else(|e| wrong("CONFIG", e));
    }

    /// Writes `DEVICES`.
    pub fn put_device(&mut self, device: &Device) {
        let mut map: HashMap<_, u32, Device> =
            self.map_mut("DEVICES").try_into().unwrap_or_else(|e| wrong("DEVICES", e));
        map.insert(device.ifindex, device, 0).unwrap_or_else(|e| wrong("DEVICES", e));
    }

    /// Every counter that is not zero, by code; one without a name is a bug of the programs.
    pub fn counters(&self) -> BTreeMap<u32, u64> {
        let map: PerCpuArray<_, u64> = self.map("STATS").try_into().unwrap_or_else(|e| wrong("STATS", e));
        (0..map.len())
            .map(|code| {
                let values = map.get(&code, 0).unwrap_or_else(|e| wrong("STATS", e));
                (code, values.iter().sum())
            })
            .filter(|(_, count)| *count != 0)
            .collect()
    }

    /// New flows and refused packets of a port id.
    pub fn port_stats(&self, port_id: u32) -> (u64, u64) {
        let map: PerCpuArray<_, PortStats> =
            self.map("PORT_STATS").try_into().unwrap_or_else(|e| wrong("PORT_STATS", e));
        let values = map.get(&port_id, 0).unwrap_or_else(|e| wrong("PORT_STATS", e));
        (values.iter().map(|v| v.new_flows).sum(), values.iter().map(|v| v.refused).sum())
    }

    fn table<F: Family>(&self, table: Table) -> HashMap<&MapData, FlowKey<F>, Flow<F>> {
        self.map(table.map::<F>()).try_into().unwrap_or_else(|e| wrong(table.map::<F>(), e))
    }

    /// The entries of a table.
    pub fn flows<F: Family>(&self, table: Table) -> Vec<(FlowKey<F>, Flow<F>)> {
        self.table(table).iter().map(|entry| entry.unwrap_or_else(|e| wrong(table.map::<F>(), e))).collect()
    }

    /// Number of entries of a table, both families.
    pub fn count(&self, table: Table) -> usize {
        self.flows::<V4>(table).len() + self.flows::<V6>(table).len()
    }

    /// Writes an entry of a table.
    pub fn put_flow<F: Family>(&mut self, table: Table, key: &FlowKey<F>, flow: &Flow<F>) {
        let name = table.map::<F>();
        let mut map: HashMap<_, FlowKey<F>, Flow<F>> = self.map_mut(name).try_into().unwrap_or_else(|e| wrong(name, e));
        map.insert(key, flow, 0).unwrap_or_else(|e| wrong(name, e));
    }

    /// Removes an entry of a table.
    pub fn remove_flow<F: Family>(&mut self, table: Table, key: &FlowKey<F>) {
        let name = table.map::<F>();
        let mut map: HashMap<_, FlowKey<F>, Flow<F>> = self.map_mut(name).try_into().unwrap_or_else(|e| wrong(name, e));
        map.remove(key).unwrap_or_else(|e| wrong(name, e));
    }

    /// Empties a table, both families.
    pub fn clear(&mut self, table: Table) {
        for (key, _) in self.flows::<V4>(table) {
            self.remove_flow(table, &key);
        }
        for (key, _) in self.flows::<V6>(table) {
            self.remove_flow(table, &key);
        }
    }

    /// Lets time pass for every flow: their last packet is this much longer ago.
    pub fn age(&mut self, secs: u32) {
        self.age_family::<V4>(secs);
        self.age_family::<V6>(secs);
    }

    /// Lets time pass for the affinity of every client.
    pub fn age_affinities(&mut self, secs: u32) {
        self.age_affinities_of::<V4>(secs);
        self.age_affinities_of::<V6>(secs);
    }

    fn age_affinities_of<F: Family>(&mut self, secs: u32) {
        let name = if F::IS_V6 { "AFFINITY_V6" } else { "AFFINITY_V4" };
        let map = self.map_mut(name);
        let mut map: HashMap<_, AffinityKey<F>, Affinity> = map.try_into().unwrap_or_else(|e| wrong(name, e));
        let entries: Vec<_> = map.iter().map(|entry| entry.unwrap_or_else(|e| wrong(name, e))).collect();
        for (key, mut affinity) in entries {
            affinity.last_new_secs = affinity.last_new_secs.wrapping_sub(secs);
            map.insert(key, affinity, 0).unwrap_or_else(|e| wrong(name, e));
        }
    }

    /// Adds a ServiceCIDR of this family, the only one.
    pub fn put_service_cidr<F: Family>(&mut self, addr: F::Addr, prefix_len: u32, mask: F::Addr)
    where
        F::Addr: aya::Pod,
    {
        let name = if F::IS_V6 { "SVC_CIDRS_V6" } else { "SVC_CIDRS_V4" };
        let mut map: LpmTrie<_, F::Addr, u32> = self.map_mut(name).try_into().unwrap_or_else(|e| wrong(name, e));
        map.insert(&lpm_trie::Key::new(prefix_len, addr), 1, 0).unwrap_or_else(|e| wrong(name, e));
        self.configure(|config| {
            let (addr, mask) = (addr.words(), mask.words());
            if F::IS_V6 {
                config.flags |= Config::SERVICE_CIDRS_V6;
                (config.service_v6, config.service_mask_v6) = (Addr6::of_words(addr), Addr6::of_words(mask));
            } else {
                config.flags |= Config::SERVICE_CIDRS_V4;
                (config.service_v4, config.service_mask_v4) = (Addr4::of_words(addr), Addr4::of_words(mask));
            }
        });
    }

    fn age_family<F: Family>(&mut self, secs: u32) {
        for table in [Table::Confirmed, Table::HalfOpen] {
            for (key, mut flow) in self.flows::<F>(table) {
                flow.last_seen_secs = flow.last_seen_secs.wrapping_sub(secs);
                self.put_flow(table, &key, &flow);
            }
        }
    }

    /// The half-open flow of this client's port was used three seconds ago: with its next packet it is a lasting one.
    pub fn let_last(&self, client_port: u16) {
        self.let_last_in::<V4>(client_port);
        self.let_last_in::<V6>(client_port);
    }

    fn let_last_in<F: Family>(&self, client_port: u16) {
        let name = Table::HalfOpen.map::<F>();
        let Map::LruHashMap(data) = self.map(name) else { panic!("{name} is an LRU hash") };
        let fd = data.fd().as_fd().try_clone_to_owned().unwrap_or_else(|e| wrong(name, e));
        let own = MapData::from_fd(fd).unwrap_or_else(|e| wrong(name, e));
        let mut map: HashMap<_, FlowKey<F>, Flow<F>> =
            Map::LruHashMap(own).try_into().unwrap_or_else(|e| wrong(name, e));
        let now = proxy_agent::dataplane::sys::monotonic_secs();
        let of_client = |(key, flow): &(FlowKey<F>, Flow<F>)| [key.sport, flow.dport].contains(&client_port);
        for (key, mut flow) in self.flows::<F>(Table::HalfOpen).into_iter().filter(of_client) {
            flow.last_seen_secs = now.wrapping_sub(3);
            map.insert(key, flow, 0).unwrap_or_else(|e| wrong(name, e));
        }
    }

    /// Changes every slot that some port owns.
    pub fn change_slots<F: Family>(&mut self, change: impl Fn(&mut Slot<F>)) {
        let name = if F::IS_V6 { "SLOTS_V6" } else { "SLOTS_V4" };
        let mut map: Array<_, Slot<F>> = self.map_mut(name).try_into().unwrap_or_else(|e| wrong(name, e));
        for index in 0..map.len() {
            let mut slot = map.get(&index, 0).unwrap_or_else(|e| wrong(name, e));
            if slot.owner != Slot::<F>::NO_OWNER && slot.addr != F::UNSPECIFIED {
                change(&mut slot);
                map.set(index, slot, 0).unwrap_or_else(|e| wrong(name, e));
            }
        }
    }

    /// The state that decides about the next packet, as text.
    pub fn describe(&self) -> String {
        let mut out = String::new();
        for (code, count) in self.counters() {
            let name = Outcome::from_code(code).map_or("(unknown)", Outcome::name);
            writeln!(out, "    {name} ({code}): {count}").expect("strings take everything");
        }
        self.describe_family::<V4>(&mut out);
        self.describe_family::<V6>(&mut out);
        out
    }

    fn describe_family<F: Family>(&self, out: &mut String) {
        for table in [Table::Confirmed, Table::HalfOpen] {
            for (key, flow) in self.flows::<F>(table) {
                let name = table.map::<F>();
                writeln!(out, "    {name} {} = {}", show_key(&key), show_flow(&flow)).expect("strings take everything");
            }
        }
    }
}

/// An address of the ABI from one of the standard library's.
pub(super) trait FromIp: Address {
    /// The conversion; panics if the family differs.
    fn from_ip(addr: IpAddr) -> Self;
}

impl FromIp for Addr4 {
    fn from_ip(addr: IpAddr) -> Self {
        match addr {
            IpAddr::V4(addr) => addr.into(),
            IpAddr::V6(addr) => panic!("{addr} is no IPv4 address"),
        }
    }
}

impl FromIp for Addr6 {
    fn from_ip(addr: IpAddr) -> Self {
        match addr {
            IpAddr::V6(addr) => addr.into(),
            IpAddr::V4(addr) => panic!("{addr} is no IPv6 address"),
        }
    }
}

fn show_key<F: Family>(key: &FlowKey<F>) -> String {
    let (src, dst): (IpAddr, IpAddr) = (key.src.into(), key.dst.into());
    let direction = if key.dir == 0 { "in" } else { "out" };
    format!("{src}.{} > {dst}.{} proto {} {direction}", key.sport, key.dport, key.proto)
}

fn show_flow<F: Family>(flow: &Flow<F>) -> String {
    let (src, dst): (IpAddr, IpAddr) = (flow.src.into(), flow.dst.into());
    let names = [
        (Flow::<F>::REPLY, "reply"),
        (Flow::<F>::BRIDGED, "bridged"),
        (Flow::<F>::REDIRECT, "redirect"),
        (Flow::<F>::REINJECT, "reinject"),
        (Flow::<F>::HAIRPIN, "hairpin"),
        (Flow::<F>::PINNED, "pinned"),
        (Flow::<F>::DIRECT, "direct"),
    ];
    let flags: Vec<_> = names.iter().filter(|(bit, _)| flow.flags & bit != 0).map(|(_, name)| *name).collect();
    format!(
        "{src}.{} > {dst}.{} [{}] seen {:#x}/{:#x} port {} endpoint {}/{} device {} entry {:02x?} next {:02x?} at {}",
        flow.sport,
        flow.dport,
        flags.join(" "),
        flow.seen_client,
        flow.seen_server,
        flow.port_id,
        flow.endpoint_id,
        flow.endpoint_gen,
        flow.ifindex,
        flow.entry_mac,
        flow.next_mac,
        flow.last_seen_secs,
    )
}
