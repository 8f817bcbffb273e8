//! The maps in the kernel: one typed accessor per map, hash maps through `bpf(2)`, arrays through [`mmap`].

pub mod grace;
pub mod mmap;
mod value;

pub(crate) use value::live_generation;
pub(super) use value::{of_words, words_of};

use std::io;
use std::net::IpAddr;
use std::os::fd::AsFd;

use aya::Pod;
use aya::maps::lpm_trie::LpmTrie;
use aya::maps::{HashMap, IterableMap, Map, MapData};
use ipnet::IpNet;
use proxy_common::abi::{Name, NodeAddr, Port, Service, ServiceKey, SourceRange};
use proxy_common::{Family, V4, V6};

use self::grace::Grace as GracePeriod;
use self::mmap::MappedArray;
use self::value::{
    Failure, describe, insert, insert_network, is_full, live_word, network_key, network_of, remove, remove_network,
    slot_of, source_range_key, source_range_of, store_slot, tuple_of,
};
use super::pin::PinRoot;
use super::{Capacities, Dataplane, DataplaneError, Grace, MapName, MapOp, PortWord, Slot, Snapshot, Tuple, sys};
use crate::model::{IpFamily, PortKey};

/// The maps of one family.
struct PerFamily<F: Family>
where
    F::Addr: Pod,
{
    services: HashMap<MapData, ServiceKey<F>, Service>,
    cluster_ips: HashMap<MapData, F::Addr, u32>,
    node_addrs: HashMap<MapData, F::Addr, NodeAddr>,
    source_ranges: LpmTrie<MapData, SourceRange<F>, u32>,
    service_cidrs: LpmTrie<MapData, F::Addr, u32>,
    slots: MappedArray,
}

impl<F: Family> PerFamily<F>
where
    F::Addr: Pod,
{
    fn dump(&self, family: IpFamily, zero: F::Addr, out: &mut Snapshot) -> Result<(), DataplaneError> {
        let key = ServiceKey::new(zero, 0, 0);
        let service = Service { port_id: 0, class: 0, flags: 0, _pad: 0 };
        for_each(&self.services, (key, service), |key, service| {
            if let Some(tuple) = tuple_of(key) {
                out.services.insert(tuple, *service);
            }
        })
        .map_err(|e| reading(MapName::services(family), e))?;
        for_each(&self.cluster_ips, (zero, 0), |addr, _| {
            out.cluster_ips.insert((*addr).into());
        })
        .map_err(|e| reading(MapName::cluster_ips(family), e))?;
        for_each(&self.node_addrs, (zero, NodeAddr { flags: 0 }), |addr, value| {
            out.node_addrs.insert((*addr).into(), value.flags);
        })
        .map_err(|e| reading(MapName::node_addrs(family), e))?;
        for entry in self.source_ranges.keys() {
            let key = entry.map_err(|e| reading(MapName::source_ranges(family), io::Error::other(e)))?;
            out.source_ranges.extend(source_range_of(&key));
        }
        for entry in self.service_cidrs.keys() {
            let key = entry.map_err(|e| reading(MapName::service_cidrs(family), io::Error::other(e)))?;
            out.service_cidrs.extend(network_of(key.data().into(), key.prefix_len()));
        }
        Ok(())
    }
}

/// The maps in the kernel.
pub struct BpfDataplane {
    capacities: Capacities,
    v4: PerFamily<V4>,
    v6: PerFamily<V6>,
    ports: MappedArray,
    live: MappedArray,
    filter: MappedArray,
    node_ports: MappedArray,
    names: HashMap<MapData, u32, Name>,
    grace: Option<GracePeriod>,
}

/// Whether maps are opened to be written or only to be looked at.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Access {
    /// By the agent.
    Write,
    /// By a command that shows them.
    Read,
}

/// Opens the pinned maps.
struct Opener<'a> {
    pins: &'a PinRoot,
    access: Access,
}

impl Opener<'_> {
    fn data(&self, map: MapName) -> Result<MapData, DataplaneError> {
        MapData::from_pin(self.pins.map(map.as_str())).map_err(|e| DataplaneError::failed("open", map, e))
    }

    fn hash<K: Pod, V: Pod>(&self, map: MapName) -> Result<HashMap<MapData, K, V>, DataplaneError> {
        let data = self.data(map)?;
        HashMap::try_from(Map::HashMap(data)).map_err(|e| DataplaneError::failed("open", map, e))
    }

    fn trie<K: Pod>(&self, map: MapName) -> Result<LpmTrie<MapData, K, u32>, DataplaneError> {
        let data = self.data(map)?;
        LpmTrie::try_from(Map::LpmTrie(data)).map_err(|e| DataplaneError::failed("open", map, e))
    }

    fn array(&self, map: MapName) -> Result<MappedArray, DataplaneError> {
        let data = self.data(map)?;
        MappedArray::new(&data, self.access == Access::Write).map_err(|e| DataplaneError::failed("open", map, e))
    }

    fn family<F: Family>(&self, family: IpFamily) -> Result<PerFamily<F>, DataplaneError>
    where
        F::Addr: Pod,
    {
        Ok(PerFamily {
            services: self.hash(MapName::services(family))?,
            cluster_ips: self.hash(MapName::cluster_ips(family))?,
            node_addrs: self.hash(MapName::node_addrs(family))?,
            source_ranges: self.trie(MapName::source_ranges(family))?,
            service_cidrs: self.trie(MapName::service_cidrs(family))?,
            slots: self.array(MapName::slots(family))?,
        })
    }
}

impl BpfDataplane {
    /// Opens the maps pinned under `pins`.
    pub fn open(pins: &PinRoot, access: Access) -> Result<Self, DataplaneError> {
        let open = Opener { pins, access };
        let entries = |map: MapName| {
            let info = open.data(map)?.info().map_err(|e| DataplaneError::failed("look at", map, e))?;
            Ok::<_, DataplaneError>(info.max_entries())
        };
        let capacities = Capacities {
            services: entries(MapName::ServicesV4)?,
            cluster_ips: entries(MapName::ClusterIpsV4)?,
            ports: entries(MapName::Ports)?,
            slots: entries(MapName::SlotsV4)?,
            live: entries(MapName::Live)?,
            node_addrs: entries(MapName::NodeAddrsV4)?,
            source_ranges: entries(MapName::SrcRangesV4)?,
            // The loader makes the maps of a missing family as small as maps can be.
            ipv6: entries(MapName::SlotsV6)? > 1,
        };
        let grace = match access {
            Access::Write => Some(
                GracePeriod::new()
                    .map_err(|e| DataplaneError::failed("prepare grace periods of", MapName::SlotsV4, e))?,
            ),
            Access::Read => None,
        };
        Ok(Self {
            capacities,
            v4: open.family(IpFamily::V4)?,
            v6: open.family(IpFamily::V6)?,
            ports: open.array(MapName::Ports)?,
            live: open.array(MapName::Live)?,
            filter: open.array(MapName::Filter)?,
            node_ports: open.array(MapName::NodePorts)?,
            names: open.hash(MapName::Names)?,
            grace,
        })
    }

    /// Sizes of the maps.
    pub const fn capacities(&self) -> &Capacities {
        &self.capacities
    }

    fn put_service(&mut self, tuple: &Tuple, service: &Service) -> Result<(), Failure> {
        let (port, proto) = (tuple.port, tuple.protocol.number());
        match tuple.addr {
            IpAddr::V4(a) => insert(&mut self.v4.services, &ServiceKey::new(a.into(), port, proto), service),
            IpAddr::V6(a) => insert(&mut self.v6.services, &ServiceKey::new(a.into(), port, proto), service),
        }
    }

    fn delete_service(&mut self, tuple: &Tuple) -> Result<(), Failure> {
        let (port, proto) = (tuple.port, tuple.protocol.number());
        match tuple.addr {
            IpAddr::V4(a) => remove(&mut self.v4.services, &ServiceKey::new(a.into(), port, proto)),
            IpAddr::V6(a) => remove(&mut self.v6.services, &ServiceKey::new(a.into(), port, proto)),
        }
    }

    fn carry_out(&mut self, op: &MapOp) -> Result<(), Failure> {
        match op {
            MapOp::PutService { tuple, service } => self.put_service(tuple, service),
            MapOp::DeleteService { tuple } => self.delete_service(tuple),
            MapOp::PutClusterIp { addr: IpAddr::V4(a) } => insert(&mut self.v4.cluster_ips, &(*a).into(), &1),
            MapOp::PutClusterIp { addr: IpAddr::V6(a) } => insert(&mut self.v6.cluster_ips, &(*a).into(), &1),
            MapOp::DeleteClusterIp { addr: IpAddr::V4(a) } => remove(&mut self.v4.cluster_ips, &(*a).into()),
            MapOp::DeleteClusterIp { addr: IpAddr::V6(a) } => remove(&mut self.v6.cluster_ips, &(*a).into()),
            MapOp::StorePort { port_id, word, value } => Ok(self.ports.store(*port_id, word.index(), *value)?),
            MapOp::PutSlot { index, slot } => match slot.family() {
                IpFamily::V4 => store_slot(&mut self.v4.slots, *index, slot),
                IpFamily::V6 => store_slot(&mut self.v6.slots, *index, slot),
            },
            MapOp::StoreLive { endpoint_id, generation } => {
                Ok(self.live.store(*endpoint_id, 0, live_word(*generation))?)
            }
            MapOp::PutName { port_id, key } => insert(&mut self.names, port_id, &key.to_name()),
            MapOp::DeleteName { port_id } => remove(&mut self.names, port_id),
            MapOp::StoreNodePorts { index, bits } => Ok(self.node_ports.store(*index, 0, *bits)?),
            MapOp::StoreFilter { index, buckets } => Ok(self.filter.store(*index, 0, *buckets)?),
            MapOp::PutNodeAddr { addr: IpAddr::V4(a), flags } => {
                insert(&mut self.v4.node_addrs, &(*a).into(), &NodeAddr { flags: *flags })
            }
            MapOp::PutNodeAddr { addr: IpAddr::V6(a), flags } => {
                insert(&mut self.v6.node_addrs, &(*a).into(), &NodeAddr { flags: *flags })
            }
            MapOp::DeleteNodeAddr { addr: IpAddr::V4(a) } => remove(&mut self.v4.node_addrs, &(*a).into()),
            MapOp::DeleteNodeAddr { addr: IpAddr::V6(a) } => remove(&mut self.v6.node_addrs, &(*a).into()),
            MapOp::PutSourceRange { port_id, net: IpNet::V4(net) } => {
                insert_network(&mut self.v4.source_ranges, &source_range_key(*port_id, net.addr(), net.prefix_len()))
            }
            MapOp::PutSourceRange { port_id, net: IpNet::V6(net) } => {
                insert_network(&mut self.v6.source_ranges, &source_range_key(*port_id, net.addr(), net.prefix_len()))
            }
            MapOp::DeleteSourceRange { port_id, net: IpNet::V4(net) } => {
                remove_network(&mut self.v4.source_ranges, &source_range_key(*port_id, net.addr(), net.prefix_len()))
            }
            MapOp::DeleteSourceRange { port_id, net: IpNet::V6(net) } => {
                remove_network(&mut self.v6.source_ranges, &source_range_key(*port_id, net.addr(), net.prefix_len()))
            }
            MapOp::PutServiceCidr { net: IpNet::V4(net) } => {
                insert_network(&mut self.v4.service_cidrs, &network_key(net.addr(), net.prefix_len()))
            }
            MapOp::PutServiceCidr { net: IpNet::V6(net) } => {
                insert_network(&mut self.v6.service_cidrs, &network_key(net.addr(), net.prefix_len()))
            }
            MapOp::DeleteServiceCidr { net: IpNet::V4(net) } => {
                remove_network(&mut self.v4.service_cidrs, &network_key(net.addr(), net.prefix_len()))
            }
            MapOp::DeleteServiceCidr { net: IpNet::V6(net) } => {
                remove_network(&mut self.v6.service_cidrs, &network_key(net.addr(), net.prefix_len()))
            }
        }
    }

    fn dump_port(&mut self, id: u32, out: &mut Snapshot) -> Result<(), DataplaneError> {
        let mut port = Port::UNUSED;
        for word in PortWord::ALL {
            let value = self.ports.load(id, word.index()).map_err(|e| reading(MapName::Ports, e))?;
            word.set(&mut port, value);
        }
        out.ports.insert(id, port);
        Ok(())
    }

    fn dump_slots(&mut self, family: IpFamily, out: &mut Snapshot) -> Result<(), DataplaneError> {
        let (slots, into, map) = match family {
            IpFamily::V4 => (&mut self.v4.slots, &mut out.slots_v4, MapName::SlotsV4),
            IpFamily::V6 => (&mut self.v6.slots, &mut out.slots_v6, MapName::SlotsV6),
        };
        let each = |index, words: &[u64]| {
            let slot = slot_of(family, words);
            // A slot that was never written holds zeros, and no port has the id 0.
            if !matches!(slot.owner, 0 | Slot::NO_OWNER) {
                into.insert(index, slot);
            }
        };
        slots.scan(each).map_err(|e| reading(map, e))
    }
}

impl Dataplane for BpfDataplane {
    fn dump(&mut self) -> Result<Snapshot, DataplaneError> {
        let mut out = Snapshot { capacities: self.capacities, ..Snapshot::default() };
        self.v4.dump(IpFamily::V4, value::V4_ZERO, &mut out)?;
        self.v6.dump(IpFamily::V6, value::V6_ZERO, &mut out)?;
        for_each(&self.names, (0, Name::new("", 0, 0)), |id, name| {
            if let Some(key) = PortKey::from_name(name) {
                out.names.insert(*id, key);
            }
        })
        .map_err(|e| reading(MapName::Names, e))?;
        for id in out.names.keys().copied().collect::<Vec<_>>() {
            if id < self.ports.entries() {
                self.dump_port(id, &mut out)?;
            }
        }
        for family in IpFamily::ALL {
            self.dump_slots(family, &mut out)?;
        }
        let words = |array: &mut MappedArray, map, into: &mut dyn FnMut(u32, u64)| {
            let each = |index, words: &[u64]| {
                if words[0] != 0 {
                    into(index, words[0]);
                }
            };
            array.scan(each).map_err(|e| reading(map, e))
        };
        words(&mut self.live, MapName::Live, &mut |id, word| {
            out.live.insert(id, live_generation(word));
        })?;
        words(&mut self.node_ports, MapName::NodePorts, &mut |index, bits| {
            out.node_ports.insert(index, bits);
        })?;
        words(&mut self.filter, MapName::Filter, &mut |index, buckets| {
            out.filter.insert(index, buckets);
        })?;
        Ok(out)
    }

    fn write(&mut self, op: &MapOp) -> Result<(), DataplaneError> {
        self.carry_out(op).map_err(|error| {
            let what = describe(op);
            if is_full(error.as_ref()) {
                DataplaneError::full(what, op.map(), &self.capacities)
            } else {
                DataplaneError::failed(what, op.map(), error)
            }
        })
    }

    fn grace(&mut self) -> Grace {
        let grace = self.grace.clone();
        Box::new(move || match grace {
            Some(grace) => {
                grace.wait().map_err(|e| DataplaneError::failed("wait for the readers of", MapName::SlotsV4, e))
            }
            None => Err(DataplaneError::failed("wait for the readers of", MapName::SlotsV4, "opened for reading only")),
        })
    }
}

fn reading(map: MapName, error: io::Error) -> DataplaneError {
    DataplaneError::failed("read", map, error)
}

fn for_each<K: Pod, V: Pod>(map: &HashMap<MapData, K, V>, zero: (K, V), each: impl FnMut(&K, &V)) -> io::Result<()> {
    sys::for_each_in_hash(map.map().fd().as_fd(), zero, each)
}
