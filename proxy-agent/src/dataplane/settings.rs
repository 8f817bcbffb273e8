//! `CONFIG`: what it should say, and how a running agent changes it: by stores of whole words, so that programs see either
//! the old or the new setting, and no mixture.

use std::io;
use std::net::IpAddr;

use aya::maps::MapData;
use ipnet::IpNet;
use proxy_common::abi::Config;

use super::bpf::mmap::MappedArray;
use super::bpf::{of_words, words_of};
use super::pin::PinRoot;
use crate::source_ports::SourcePorts;

/// How pods of this node are told from others.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub enum Local {
    /// Not at all.
    #[default]
    Unknown,
    /// By the device.
    Devices,
    /// By the address, at most one network of each family.
    Networks(Vec<IpNet>),
    /// By networks that are still to be told: those of an earlier agent hold until then.
    Later,
}

/// What `CONFIG` should say, as far as it may change while an agent runs.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Wanted {
    /// kube-proxy's rules stand.
    pub kube_proxy: bool,
    /// `--masquerade-all`.
    pub masquerade_all: bool,
    /// How pods are told.
    pub local: Local,
    /// Source ports of masquerade.
    pub source_ports: SourcePorts,
    /// The smallest network around all ServiceCIDRs of a family, each family at most once; `None` while they are still to
    /// be told.
    pub service_cidrs: Option<Vec<IpNet>>,
}

/// Flags that [`Wanted`] decides.
const FLAGS: u32 = Config::KUBE_PROXY
    | Config::MASQUERADE_ALL
    | Config::LOCAL_DEVICES
    | Config::LOCAL_CIDR_V4
    | Config::LOCAL_CIDR_V6
    | Config::SERVICE_CIDRS_V4
    | Config::SERVICE_CIDRS_V6;

impl Wanted {
    /// Writes it into the settings, and nothing else.
    pub fn fill(&self, config: &mut Config) {
        let held = config.flags;
        let mut flags = held & !FLAGS;
        let mut set = |flag, on| flags |= if on { flag } else { 0 };
        set(Config::KUBE_PROXY, self.kube_proxy);
        set(Config::MASQUERADE_ALL, self.masquerade_all);
        set(Config::LOCAL_DEVICES, self.local == Local::Devices);
        match &self.local {
            Local::Unknown | Local::Devices => {}
            Local::Later => set(held & (Config::LOCAL_CIDR_V4 | Config::LOCAL_CIDR_V6), true),
            Local::Networks(networks) => networks.iter().for_each(|net| set(put_local(config, *net), true)),
        }
        match &self.service_cidrs {
            None => set(held & (Config::SERVICE_CIDRS_V4 | Config::SERVICE_CIDRS_V6), true),
            Some(networks) => networks.iter().for_each(|net| set(put_service(config, *net), true)),
        }
        config.flags = flags;
        let SourcePorts { low, high } = self.source_ports;
        (config.snat_low_first, config.snat_low_count) = (low.first, low.count);
        (config.snat_high_first, config.snat_high_count) = (high.first, high.count);
    }
}

/// Programs compare masked addresses with the network's.
fn put_local(config: &mut Config, net: IpNet) -> u32 {
    match net.trunc() {
        IpNet::V4(net) => {
            (config.local_v4, config.local_mask_v4) = (net.addr().into(), net.netmask().into());
            Config::LOCAL_CIDR_V4
        }
        IpNet::V6(net) => {
            (config.local_v6, config.local_mask_v6) = (net.addr().into(), net.netmask().into());
            Config::LOCAL_CIDR_V6
        }
    }
}

fn put_service(config: &mut Config, net: IpNet) -> u32 {
    match net.trunc() {
        IpNet::V4(net) => {
            (config.service_v4, config.service_mask_v4) = (net.addr().into(), net.netmask().into());
            Config::SERVICE_CIDRS_V4
        }
        IpNet::V6(net) => {
            (config.service_v6, config.service_mask_v6) = (net.addr().into(), net.netmask().into());
            Config::SERVICE_CIDRS_V6
        }
    }
}

/// The smallest network that holds all of a family's.
pub fn around<'a>(networks: impl IntoIterator<Item = &'a IpNet>, ipv4: bool) -> Option<IpNet> {
    let mut of_family = networks.into_iter().filter(|net| net.addr().is_ipv4() == ipv4);
    let mut found = of_family.next()?.trunc();
    for net in of_family {
        while !found.contains(net) {
            found = found.supernet()?;
        }
    }
    Some(found)
}

/// A network as people write it, from what `CONFIG` holds of it.
pub fn network(addr: IpAddr, mask: IpAddr) -> Option<IpNet> {
    let bits = match mask {
        IpAddr::V4(mask) => mask.to_bits().leading_ones(),
        IpAddr::V6(mask) => mask.to_bits().leading_ones(),
    };
    IpNet::new(addr, bits as u8).ok()
}

/// The one entry of `CONFIG`.
#[derive(Debug)]
pub struct SettingsMap(MappedArray);

/// `CONFIG` cannot be used.
#[derive(Debug, thiserror::Error)]
#[error("cannot use map CONFIG: {0}")]
pub struct SettingsError(#[from] io::Error);

/// `abi_version` and `flags` share the first word.
const VERSION_AND_FLAGS: usize = 0;
/// The programs' own.
const DIRECT_REWRITES: usize = std::mem::offset_of!(Config, direct_rewrites) / 8;
const WORDS: usize = size_of::<Config>() / 8;

/// What must change at once is one word.
const _: () = {
    assert!(std::mem::offset_of!(Config, abi_version) == 0 && std::mem::offset_of!(Config, flags) == 4);
    assert!(std::mem::offset_of!(Config, snat_low_first) % 8 == 0);
    assert!(std::mem::offset_of!(Config, local_v4) % 8 == 0 && std::mem::offset_of!(Config, service_v4) % 8 == 0);
};

/// What of IPv6 spans several words, with the flag that says that it counts.
const WIDE: [(u32, std::ops::Range<usize>); 2] = [
    (Config::LOCAL_CIDR_V6, std::mem::offset_of!(Config, local_v6) / 8..std::mem::offset_of!(Config, service_v4) / 8),
    (Config::SERVICE_CIDRS_V6, std::mem::offset_of!(Config, service_v6) / 8..WORDS),
];

impl SettingsMap {
    /// Opens the pinned map.
    pub fn open(pins: &PinRoot) -> Result<Self, SettingsError> {
        let data = MapData::from_pin(pins.map("CONFIG")).map_err(io::Error::other)?;
        Ok(Self(MappedArray::new(&data, true)?))
    }

    /// Brings the entry to what is wanted. The agent is the only writer of these words.
    pub fn apply(&mut self, wanted: &Wanted) -> Result<(), SettingsError> {
        let held: Vec<_> = (0..WORDS).map(|word| self.0.load(0, word)).collect::<io::Result<_>>()?;
        for (word, value) in stores(&held, wanted) {
            self.0.store(0, word, value)?;
        }
        Ok(())
    }
}

/// The stores that lead there, in order: a flag whose network is about to change in several words is off meanwhile, and
/// flags come last.
fn stores(held: &[u64], wanted: &Wanted) -> Vec<(usize, u64)> {
    let before: Config = of_words(held);
    let mut after = before;
    wanted.fill(&mut after);
    let next = words_of(&after);
    let moving = WIDE.into_iter().filter(|(_, words)| held[words.clone()] != next[words.clone()]);
    let off = moving.fold(0, |flags, (flag, _)| flags | flag);
    let first = words_of(&Config { flags: before.flags & after.flags & !off, ..before })[VERSION_AND_FLAGS];
    let changed = (0..WORDS).filter(|word| !matches!(*word, VERSION_AND_FLAGS | DIRECT_REWRITES));
    let changed = changed.filter(|word| held[*word] != next[*word]).map(|word| (word, next[word]));
    let mut stores: Vec<_> = changed.collect();
    if !stores.is_empty() && first != held[VERSION_AND_FLAGS] {
        stores.insert(0, (VERSION_AND_FLAGS, first));
    }
    if stores.first().map_or(held[VERSION_AND_FLAGS], |_| first) != next[VERSION_AND_FLAGS] {
        stores.push((VERSION_AND_FLAGS, next[VERSION_AND_FLAGS]));
    }
    stores
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::source_ports::{Ports, Row};

    fn nets(list: &[&str]) -> Vec<IpNet> {
        list.iter().map(|net| net.parse().unwrap()).collect()
    }

    fn wanted() -> Wanted {
        Wanted {
            kube_proxy: true,
            masquerade_all: false,
            local: Local::Networks(nets(&["10.244.3.0/16", "fd00:10::/64"])),
            source_ports: SourcePorts::free(&(32_768..=60_999), &Ports::default(), &(30_000..=32_767)),
            service_cidrs: Some(nets(&["10.96.0.0/16", "fd00:96::/108"])),
        }
    }

    /// Tests run where the first of two halves is the low one.
    const _: () = assert!(cfg!(target_endian = "little"));

    fn zero() -> Config {
        of_words(&[0; WORDS])
    }

    fn stored(held: &mut [u64], wanted: &Wanted) -> Vec<usize> {
        let stores = stores(held, wanted);
        stores.iter().for_each(|(word, value)| held[*word] = *value);
        stores.into_iter().map(|(word, _)| word).collect()
    }

    #[test]
    fn what_is_wanted_is_written_and_nothing_else() {
        let mut config = Config { abi_version: 3, flags: Config::FIB_SOURCE, seed: 5, direct_rewrites: 9, ..zero() };
        wanted().fill(&mut config);
        let expected = Config::FIB_SOURCE
            | Config::KUBE_PROXY
            | Config::LOCAL_CIDR_V4
            | Config::LOCAL_CIDR_V6
            | Config::SERVICE_CIDRS_V4
            | Config::SERVICE_CIDRS_V6;
        assert_eq!((config.flags, config.seed, config.direct_rewrites), (expected, 5, 9));
        assert_eq!(network(config.local_v4.into(), config.local_mask_v4.into()), Some(nets(&["10.244.0.0/16"])[0]));
        assert_eq!(network(config.local_v6.into(), config.local_mask_v6.into()), Some(nets(&["fd00:10::/64"])[0]));
        assert_eq!(network(config.service_v6.into(), config.service_mask_v6.into()), Some(nets(&["fd00:96::/108"])[0]));
        assert_eq!((config.snat_low_first, config.snat_low_count), (1_024, 28_976));
        assert_eq!((config.snat_high_first, config.snat_high_count), (61_000, 4_536));
        Wanted { local: Local::Devices, service_cidrs: Some(Vec::new()), ..wanted() }.fill(&mut config);
        assert_eq!(config.flags, Config::FIB_SOURCE | Config::KUBE_PROXY | Config::LOCAL_DEVICES);
    }

    #[test]
    fn what_is_still_to_be_told_stays_as_it_was() {
        let mut config = zero();
        wanted().fill(&mut config);
        let before = config;
        Wanted { local: Local::Later, service_cidrs: None, ..wanted() }.fill(&mut config);
        assert_eq!(config, before);
        let mut fresh = zero();
        Wanted { local: Local::Later, ..Wanted::default() }.fill(&mut fresh);
        assert_eq!(fresh.flags, 0);
    }

    #[test]
    fn no_program_sees_half_a_network() {
        let mut held = words_of(&Config { direct_rewrites: 1, ..zero() });
        let words = stored(&mut held, &wanted());
        assert_eq!((words[0], words.last()), (4, Some(&VERSION_AND_FLAGS)), "flags come last");
        assert!(stores(&held, &wanted()).is_empty());
        // Another network of IPv6: its flag is off while the words change.
        let moved = Wanted { local: Local::Networks(nets(&["10.244.0.0/16", "fd00:11::/48"])), ..wanted() };
        let next = stores(&held, &moved);
        assert_eq!(next.first().map(|(word, _)| *word), Some(VERSION_AND_FLAGS));
        let flags = |word: u64| (word >> 32) as u32;
        assert_eq!(flags(next[0].1) & Config::LOCAL_CIDR_V6, 0);
        assert_ne!(flags(next[0].1) & (Config::LOCAL_CIDR_V4 | Config::SERVICE_CIDRS_V6), 0);
        stored(&mut held, &moved);
        assert_ne!(flags(held[0]) & Config::LOCAL_CIDR_V6, 0);
        // Of IPv4 it is one store.
        let moved = Wanted { local: Local::Networks(nets(&["10.245.0.0/16", "fd00:11::/48"])), ..wanted() };
        assert_eq!(stored(&mut held, &moved), [5]);
        // A flag that goes, goes before what it stands for.
        let fewer =
            Wanted { source_ports: SourcePorts { high: Row::default(), ..wanted().source_ports }, ..Wanted::default() };
        assert_eq!(stored(&mut held, &Wanted { service_cidrs: Some(Vec::new()), ..fewer }), [0, 4]);
        assert_eq!(held[DIRECT_REWRITES], 1);
    }

    #[test]
    fn the_smallest_network_around_several_is_found() {
        let around = |list: &[&str], ipv4| around(&nets(list), ipv4).map(|net| net.to_string()).unwrap_or_default();
        assert_eq!(around(&["10.96.0.0/16"], true), "10.96.0.0/16");
        assert_eq!(around(&["10.96.0.0/16", "10.97.0.0/20"], true), "10.96.0.0/15");
        assert_eq!(around(&["10.96.0.0/16", "10.96.3.0/24", "fd00::/112"], true), "10.96.0.0/16");
        assert_eq!(around(&["10.96.3.0/24", "10.96.0.0/16"], true), "10.96.0.0/16");
        assert_eq!(around(&["10.96.0.0/16", "172.16.0.0/16"], true), "0.0.0.0/0");
        assert_eq!(around(&["10.96.0.0/16"], false), "");
        assert_eq!(around(&["fd00:1::/112", "fd00:2::/112"], false), "fd00::/30");
    }
}
