//! Between the values of the planner and the bytes of the maps.

use std::error::Error;
use std::net::IpAddr;

use aya::Pod;
use aya::maps::lpm_trie::{Key, LpmTrie};
use aya::maps::{HashMap, MapData, MapError};
use ipnet::IpNet;
use proxy_common::abi::range::PORT_ID_BITS;
use proxy_common::abi::{self, ServiceKey, SourceRange};
use proxy_common::{Addr4, Addr6, Family, V4, V6};

use super::mmap::MappedArray;
use crate::dataplane::{MapOp, Slot, Tuple};
use crate::model::{IpFamily, Protocol};

pub(super) type Failure = Box<dyn Error + Send + Sync>;

/// Inserts or replaces.
pub(super) fn insert<K: Pod, V: Pod>(map: &mut HashMap<MapData, K, V>, key: &K, value: &V) -> Result<(), Failure> {
    Ok(map.insert(key, value, 0)?)
}

/// Removes; nothing to remove is no failure.
pub(super) fn remove<K: Pod, V: Pod>(map: &mut HashMap<MapData, K, V>, key: &K) -> Result<(), Failure> {
    removed(map.remove(key))
}

fn removed(result: Result<(), MapError>) -> Result<(), Failure> {
    match result {
        Err(MapError::KeyNotFound) => Ok(()),
        Err(MapError::SyscallError(e)) if e.io_error.raw_os_error() == Some(libc::ENOENT) => Ok(()),
        result => Ok(result?),
    }
}

/// Adds a network to a longest-prefix map. Its value says nothing.
pub(super) fn insert_network<K: Pod>(map: &mut LpmTrie<MapData, K, u32>, key: &Key<K>) -> Result<(), Failure> {
    Ok(map.insert(key, 1, 0)?)
}

/// Removes a network; nothing to remove is no failure.
pub(super) fn remove_network<K: Pod>(map: &mut LpmTrie<MapData, K, u32>, key: &Key<K>) -> Result<(), Failure> {
    removed(map.remove(key))
}

/// Key of `SVC_CIDRS_V4/6`.
pub(super) fn network_key<A: Pod>(addr: impl Into<A>, prefix: u8) -> Key<A> {
    Key::new(prefix.into(), addr.into())
}

/// Key of `SRC_RANGES_V4/6`.
pub(super) fn source_range_key<F: Family>(port_id: u32, addr: impl Into<F::Addr>, prefix: u8) -> Key<SourceRange<F>>
where
    F::Addr: Pod,
{
    Key::new(PORT_ID_BITS + u32::from(prefix), SourceRange { port_id, addr: addr.into() })
}

/// A key of `SVC_CIDRS_V4/6` as a network; `None` for one that nobody wrote.
pub(super) fn network_of(addr: IpAddr, prefix: u32) -> Option<IpNet> {
    IpNet::new(addr, u8::try_from(prefix).ok()?).ok()
}

/// A key of `SRC_RANGES_V4/6` as port id and network; `None` for one that nobody wrote.
pub(super) fn source_range_of<F: Family>(key: &Key<SourceRange<F>>) -> Option<(u32, IpNet)>
where
    F::Addr: Pod,
{
    let range = key.data();
    Some((range.port_id, network_of(range.addr.into(), key.prefix_len().checked_sub(PORT_ID_BITS)?)?))
}

/// True if a map had no room: hash maps say E2BIG, some kernels ENOSPC.
pub(super) fn is_full(error: &(dyn Error + Send + Sync + 'static)) -> bool {
    match error.downcast_ref::<MapError>() {
        Some(MapError::SyscallError(e)) => matches!(e.io_error.raw_os_error(), Some(libc::E2BIG | libc::ENOSPC)),
        _ => false,
    }
}

/// The words of a slot in memory order.
pub(super) fn store_slot(array: &mut MappedArray, index: u32, slot: &Slot) -> Result<(), Failure> {
    let words = match slot.addr {
        IpAddr::V4(addr) => words_of(&abi::Slot::<V4> {
            addr: addr.into(),
            port: slot.port,
            flags: slot.flags,
            endpoint_id: slot.endpoint_id,
            endpoint_gen: slot.endpoint_gen,
            owner: slot.owner,
            _pad: 0,
        }),
        IpAddr::V6(addr) => words_of(&abi::Slot::<V6> {
            addr: addr.into(),
            port: slot.port,
            flags: slot.flags,
            endpoint_id: slot.endpoint_id,
            endpoint_gen: slot.endpoint_gen,
            owner: slot.owner,
            _pad: [],
        }),
    };
    for (word, value) in words.into_iter().enumerate() {
        array.store(index, word, value)?;
    }
    Ok(())
}

/// Reads a slot from its words.
pub(super) fn slot_of(family: IpFamily, words: &[u64]) -> Slot {
    match family {
        IpFamily::V4 => from_slot(of_words::<abi::Slot<V4>>(words)),
        IpFamily::V6 => from_slot(of_words::<abi::Slot<V6>>(words)),
    }
}

fn from_slot<F: Family>(slot: abi::Slot<F>) -> Slot {
    Slot {
        addr: slot.addr.into(),
        port: slot.port,
        flags: slot.flags,
        endpoint_id: slot.endpoint_id,
        endpoint_gen: slot.endpoint_gen,
        owner: slot.owner,
    }
}

/// The word of `LIVE` with this generation.
pub(super) fn live_word(generation: u32) -> u64 {
    words_of(&abi::Live { generation, _pad: 0 })[0]
}

/// The generation in a word of `LIVE`.
pub(crate) fn live_generation(word: u64) -> u32 {
    of_words::<abi::Live>(&[word]).generation
}

/// A key of `SERVICES_V4/6` as a tuple; `None` for a protocol that nobody wrote.
pub(super) fn tuple_of<F: Family>(key: &ServiceKey<F>) -> Option<Tuple> {
    Some(Tuple { addr: key.addr.into(), port: key.port, protocol: Protocol::from_number(key.proto)? })
}

/// A value as the words of an array's entry.
pub(in crate::dataplane) fn words_of<T: Pod>(value: &T) -> Vec<u64> {
    // SAFETY: Pod values have no padding, so every byte is initialised.
    let bytes = unsafe { std::slice::from_raw_parts(std::ptr::from_ref(value).cast::<u8>(), size_of::<T>()) };
    bytes
        .chunks(8)
        .map(|chunk| u64::from_ne_bytes(std::array::from_fn(|i| chunk.get(i).copied().unwrap_or(0))))
        .collect()
}

/// The value that these words hold.
pub(in crate::dataplane) fn of_words<T: Pod>(words: &[u64]) -> T {
    assert!(size_of::<T>() <= size_of_val(words), "a value longer than its words");
    // SAFETY: any bytes are a valid Pod value, and the assertion says that there are enough.
    unsafe { std::ptr::read_unaligned(words.as_ptr().cast()) }
}

/// What an operation does, as a verb phrase that the map's name completes.
pub(super) fn describe(op: &MapOp) -> String {
    match op {
        MapOp::PutService { tuple, .. } => format!("add {tuple} to"),
        MapOp::DeleteService { tuple } => format!("remove {tuple} from"),
        MapOp::PutClusterIp { addr } | MapOp::PutNodeAddr { addr, .. } => format!("add {addr} to"),
        MapOp::DeleteClusterIp { addr } | MapOp::DeleteNodeAddr { addr } => format!("remove {addr} from"),
        MapOp::StorePort { port_id, word, .. } => format!("store the word {word:?} of port id {port_id} in"),
        MapOp::PutSlot { index, slot } => format!("write endpoint {} to slot {index} of", slot.addr),
        MapOp::StoreLive { endpoint_id, .. } => format!("store the generation of endpoint id {endpoint_id} in"),
        MapOp::PutName { port_id, key } => format!("add {key} (port id {port_id}) to"),
        MapOp::DeleteName { port_id } => format!("remove port id {port_id} from"),
        MapOp::StoreNodePorts { index, .. } => format!("store the bits of ports {}… in", index * 64),
        MapOp::StoreFilter { index, .. } => format!("store word {index} of"),
        MapOp::PutSourceRange { port_id, net } => format!("add {net} for port id {port_id} to"),
        MapOp::DeleteSourceRange { port_id, net } => format!("remove {net} of port id {port_id} from"),
        MapOp::PutServiceCidr { net } => format!("add {net} to"),
        MapOp::DeleteServiceCidr { net } => format!("remove {net} from"),
    }
}

/// Zero keys, as the buffers of batch reads start.
pub(super) const V4_ZERO: Addr4 = Addr4 { octets: [0; 4] };
/// The same for IPv6.
pub(super) const V6_ZERO: Addr6 = Addr6 { octets: [0; 16] };

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_source_range_survives_its_key() {
        let net: ipnet::Ipv6Net = "2001:db8::/33".parse().unwrap();
        let key = source_range_key::<V6>(7, net.addr(), net.prefix_len());
        assert_eq!((key.prefix_len(), source_range_of(&key)), (65, Some((7, IpNet::V6(net)))));
        assert_eq!(source_range_of(&Key::new(31, key.data())), None);
        assert_eq!(source_range_of(&Key::new(161, key.data())), None);
    }

    #[test]
    fn values_survive_their_words() {
        let live = live_word(7);
        assert_eq!(live_generation(live), 7);
        let slot = abi::Slot::<V6> {
            addr: Addr6 { octets: [9; 16] },
            port: 8080,
            flags: Slot::LOCAL,
            endpoint_id: 1,
            endpoint_gen: 2,
            owner: 3,
            _pad: [],
        };
        assert_eq!(slot_of(IpFamily::V6, &words_of(&slot)), from_slot(slot));
        assert_eq!(words_of(&slot).len(), 4);
    }
}
