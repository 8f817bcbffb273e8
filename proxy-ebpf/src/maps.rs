//! Every map, and the accessors that the steps use. No other file names a map of its own.
//!
//! Sizes are the defaults; the agent sets what its flags say before it loads the object.

use crate::step::service::Choice;
use aya_ebpf::bindings::{BPF_F_MMAPABLE, BPF_F_NO_PREALLOC};
use aya_ebpf::btf_maps::LpmTrie;
use aya_ebpf::btf_maps::{Array, HashMap, LruHashMap, PerCpuArray, ProgramArray};
use aya_ebpf::macros::btf_map;
use proxy_common::abi::config::RejectBucket;
use proxy_common::abi::{
    Affinity, AffinityKey, Config, Device, Flow, FlowKey, Live, Name, NodeAddr, Port, PortStats, Service, ServiceKey,
    Slot, SourceRange, Tally, filter, sizes,
};
use proxy_common::{CODES, Family, Outcome, V4, V6};

/// An element was there already (`EEXIST`).
pub(crate) const EXISTS: i32 = -17;
/// `BPF_ANY`.
pub(crate) const ANY: u64 = 0;
/// `BPF_NOEXIST`.
pub(crate) const NOEXIST: u64 = 1;

const MMAP: usize = BPF_F_MMAPABLE as usize;
// Not preallocated: an element of a preallocated hash can be recycled under a reader, who then sees another key's value.
const SPARSE: usize = BPF_F_NO_PREALLOC as usize;

/// Endpoints of the same hash share a cursor, and only come round sooner.
const CURSOR_COUNT: u32 = 4_096;

type Services<F> = HashMap<ServiceKey<F>, Service, { sizes::SERVICES as usize }, SPARSE>;
type ClusterIps<A> = HashMap<A, u32, { sizes::CLUSTER_IPS as usize }, SPARSE>;
type Slots<F> = Array<Slot<F>, { sizes::SLOTS as usize }, MMAP>;
type Flows<F> = HashMap<FlowKey<F>, Flow<F>, { sizes::FLOWS as usize }>;
type New<F> = LruHashMap<FlowKey<F>, Flow<F>, { sizes::NEW as usize }>;
type Affinities<F> = LruHashMap<AffinityKey<F>, Affinity, { sizes::AFFINITY as usize }>;
type SourceRanges<F> = LpmTrie<SourceRange<F>, u32, { sizes::SRC_RANGES as usize }>;
type ServiceCidrs<A> = LpmTrie<A, u32, { sizes::SVC_CIDRS as usize }>;
type Fragments<F> = LruHashMap<FlowKey<F>, Flow<F>, { sizes::FRAGS as usize }>;
type NodeAddrs<A> = HashMap<A, NodeAddr, { sizes::NODE_ADDRS as usize }, SPARSE>;

#[btf_map]
static SERVICES_V4: Services<V4> = HashMap::new();
#[btf_map]
static SERVICES_V6: Services<V6> = HashMap::new();
#[btf_map]
static CLUSTER_IPS_V4: ClusterIps<<V4 as Family>::Addr> = HashMap::new();
#[btf_map]
static CLUSTER_IPS_V6: ClusterIps<<V6 as Family>::Addr> = HashMap::new();
#[btf_map]
static SLOTS_V4: Slots<V4> = Array::new();
#[btf_map]
static SLOTS_V6: Slots<V6> = Array::new();
#[btf_map]
static FLOWS_V4: Flows<V4> = HashMap::new();
#[btf_map]
static FLOWS_V6: Flows<V6> = HashMap::new();
#[btf_map]
static NEW_V4: New<V4> = LruHashMap::new();
#[btf_map]
static NEW_V6: New<V6> = LruHashMap::new();
#[btf_map]
static NODE_ADDRS_V4: NodeAddrs<<V4 as Family>::Addr> = HashMap::new();
#[btf_map]
static NODE_ADDRS_V6: NodeAddrs<<V6 as Family>::Addr> = HashMap::new();
#[btf_map]
static AFFINITY_V4: Affinities<V4> = LruHashMap::new();
#[btf_map]
static AFFINITY_V6: Affinities<V6> = LruHashMap::new();
#[btf_map]
static FRAGS_V4: Fragments<V4> = LruHashMap::new();
#[btf_map]
static FRAGS_V6: Fragments<V6> = LruHashMap::new();
#[btf_map]
static SRC_RANGES_V4: SourceRanges<V4> = LpmTrie::new();
#[btf_map]
static SRC_RANGES_V6: SourceRanges<V6> = LpmTrie::new();
#[btf_map]
static SVC_CIDRS_V4: ServiceCidrs<<V4 as Family>::Addr> = LpmTrie::new();
#[btf_map]
static SVC_CIDRS_V6: ServiceCidrs<<V6 as Family>::Addr> = LpmTrie::new();

#[btf_map]
static PORTS: Array<Port, { sizes::PORTS as usize }, MMAP> = Array::new();
#[btf_map]
static LIVE: Array<Live, { sizes::LIVE as usize }, MMAP> = Array::new();
#[btf_map]
static FILTER: Array<u64, { filter::WORDS as usize }, MMAP> = Array::new();
#[btf_map]
static NODE_PORTS: Array<u64, { sizes::NODE_PORTS as usize }, MMAP> = Array::new();
#[btf_map]
static DEVICES: HashMap<u32, Device, { sizes::DEVICES as usize }, SPARSE> = HashMap::new();
#[btf_map]
pub(crate) static CONFIG: Array<Config, 1, MMAP> = Array::new();
#[btf_map]
static STATS: PerCpuArray<u64, { CODES as usize }> = PerCpuArray::new();
#[btf_map]
static PORT_STATS: PerCpuArray<PortStats, { sizes::PORTS as usize }> = PerCpuArray::new();
#[btf_map]
static REJECTS: PerCpuArray<RejectBucket, 1> = PerCpuArray::new();
#[btf_map]
static CLOCK: Array<u64, 1> = Array::new();
#[btf_map]
static CURSORS: Array<u32, { CURSOR_COUNT as usize }> = Array::new();
#[cfg(not(feature = "flat"))]
#[btf_map]
static PROGRAMS: ProgramArray<{ sizes::PROGRAMS as usize }> = ProgramArray::new();
// All other maps are common to both objects: a flow that began on a device of one kind goes on over one of the other.
#[cfg(feature = "flat")]
#[btf_map]
static PROGRAMS_FLAT: ProgramArray<{ sizes::PROGRAMS as usize }> = ProgramArray::new();
// Written and read by the agent alone; it stands here so that the object carries its BTF for bpftool.
#[btf_map]
static NAMES: HashMap<u32, Name, { sizes::PORTS as usize }, SPARSE> = HashMap::new();

/// The reply's key and entry in the making, outside the 512 bytes of stack. Programs on one CPU do not interleave.
#[repr(C)]
#[derive(Clone, Copy)]
pub(crate) struct Entry<F: Family> {
    pub(crate) key: FlowKey<F>,
    pub(crate) value: Flow<F>,
    /// Room for the key of a further look-up.
    pub(crate) partner: FlowKey<F>,
}

#[btf_map]
static REQUEST_V4: PerCpuArray<Flow<V4>, 1> = PerCpuArray::new();
#[btf_map]
static REQUEST_V6: PerCpuArray<Flow<V6>, 1> = PerCpuArray::new();
#[btf_map]
static REPLY_V4: PerCpuArray<Entry<V4>, 1> = PerCpuArray::new();
#[btf_map]
static REPLY_V6: PerCpuArray<Entry<V6>, 1> = PerCpuArray::new();

#[btf_map]
static CHOICE: PerCpuArray<Choice, 1> = PerCpuArray::new();

/// What a flow that begins may choose from; found by one subprogram, used by the next.
#[inline(always)]
pub(crate) fn choice() -> Option<&'static mut Choice> {
    tally(Tally::Scratch);
    // SAFETY: this CPU's own element, taken once per subprogram.
    CHOICE.get_ptr_mut(0).map(|choice| unsafe { &mut *choice })
}

/// The maps of one family.
pub(crate) trait Maps: Family {
    /// The packet's own entry; taken once per run by the pipeline, and once by the subprogram that may store it.
    fn request() -> Option<&'static mut Flow<Self>>;
    /// The reply's key and entry; taken once per subprogram.
    fn reply() -> Option<&'static mut Entry<Self>>;
    fn services() -> &'static Services<Self>;
    fn cluster_ips() -> &'static ClusterIps<Self::Addr>;
    fn slots() -> &'static Slots<Self>;
    fn flows() -> &'static Flows<Self>;
    fn new_flows() -> &'static New<Self>;
    fn node_addrs() -> &'static NodeAddrs<Self::Addr>;
    fn affinities() -> &'static Affinities<Self>;
    fn source_ranges() -> &'static SourceRanges<Self>;
    fn service_cidrs() -> &'static ServiceCidrs<Self::Addr>;
    fn fragments() -> &'static Fragments<Self>;
}

macro_rules! family_maps {
    ($family:ty: $services:ident $cluster_ips:ident $slots:ident $flows:ident $new:ident $node_addrs:ident $affinities:ident
        $source_ranges:ident $service_cidrs:ident $fragments:ident $request:ident $reply:ident) => {
        impl Maps for $family {
            #[inline(always)]
            fn request() -> Option<&'static mut Flow<Self>> {
                tally(Tally::Scratch);
                // SAFETY: this CPU's own element; who takes it again uses no other reference to it.
                $request.get_ptr_mut(0).map(|entry| unsafe { &mut *entry })
            }
            #[inline(always)]
            fn reply() -> Option<&'static mut Entry<Self>> {
                tally(Tally::Scratch);
                // SAFETY: this CPU's own element; no two subprograms that take it call each other.
                $reply.get_ptr_mut(0).map(|entry| unsafe { &mut *entry })
            }
            #[inline(always)]
            fn services() -> &'static Services<Self> {
                tally(Tally::Services);
                &$services
            }
            #[inline(always)]
            fn cluster_ips() -> &'static ClusterIps<Self::Addr> {
                tally(Tally::ClusterIps);
                &$cluster_ips
            }
            #[inline(always)]
            fn slots() -> &'static Slots<Self> {
                tally(Tally::Slots);
                &$slots
            }
            #[inline(always)]
            fn flows() -> &'static Flows<Self> {
                tally(Tally::Flows);
                &$flows
            }
            #[inline(always)]
            fn new_flows() -> &'static New<Self> {
                tally(Tally::New);
                &$new
            }
            #[inline(always)]
            fn node_addrs() -> &'static NodeAddrs<Self::Addr> {
                tally(Tally::NodeAddrs);
                &$node_addrs
            }
            #[inline(always)]
            fn affinities() -> &'static Affinities<Self> {
                tally(Tally::Affinity);
                &$affinities
            }
            #[inline(always)]
            fn source_ranges() -> &'static SourceRanges<Self> {
                tally(Tally::SourceRanges);
                &$source_ranges
            }
            #[inline(always)]
            fn service_cidrs() -> &'static ServiceCidrs<Self::Addr> {
                tally(Tally::ServiceCidrs);
                &$service_cidrs
            }
            #[inline(always)]
            fn fragments() -> &'static Fragments<Self> {
                tally(Tally::Fragments);
                &$fragments
            }
        }
    };
}

family_maps!(V4: SERVICES_V4 CLUSTER_IPS_V4 SLOTS_V4 FLOWS_V4 NEW_V4 NODE_ADDRS_V4 AFFINITY_V4 SRC_RANGES_V4 SVC_CIDRS_V4
    FRAGS_V4 REQUEST_V4 REPLY_V4);
family_maps!(V6: SERVICES_V6 CLUSTER_IPS_V6 SLOTS_V6 FLOWS_V6 NEW_V6 NODE_ADDRS_V6 AFFINITY_V6 SRC_RANGES_V6 SVC_CIDRS_V6
    FRAGS_V6 REQUEST_V6 REPLY_V6);

// Global data and no map: a look-up would add a branch to each that it counts, more than the verifier follows.
#[cfg(feature = "tally")]
static mut TALLY: [u64; Tally::ALL.len()] = [0; Tally::ALL.len()];

/// Counts a look-up, in the build that measures them. Every accessor of a map begins with it.
#[inline(always)]
pub(crate) fn tally(map: Tally) {
    #[cfg(feature = "tally")]
    // SAFETY: within the array; test runs are made one at a time, and nothing else runs this build.
    unsafe {
        let counter = (&raw mut TALLY).cast::<u64>().add(map as usize);
        counter.write_volatile(counter.read_volatile() + 1);
    }
    #[cfg(not(feature = "tally"))]
    let _: Tally = map;
}

/// Removes a confirmed entry. One that is gone already is what we want.
#[inline(always)]
pub(crate) fn forget<F: Maps>(key: &FlowKey<F>) {
    if F::flows().remove(key).is_err() {}
}

/// Removes a half-open entry. One that is gone already is what we want.
#[inline(always)]
pub(crate) fn forget_new<F: Maps>(key: &FlowKey<F>) {
    if F::new_flows().remove(key).is_err() {}
}

/// Jumps to a slot of [`programs`]; comes back only if the slot is empty.
///
/// Each slot has an instruction of its own: calls that differ in the slot alone are merged by LLVM, and one whose slot is
/// not a constant costs the kernel's bounds checks and an indirect jump, through a retpoline where the CPU needs those.
macro_rules! jump {
    ($ctx:expr, $slot:expr) => {
        // SAFETY: the helper's arguments are a context and a program array; nothing is held across the jump.
        unsafe {
            core::arch::asm!(
                "w3 = {slot}",
                "call 12",
                slot = const $slot,
                inout("r1") $ctx.skb.skb => _,
                inout("r2") $crate::maps::programs() => _,
                out("r0") _,
                out("r3") _,
                out("r4") _,
                out("r5") _,
            )
        }
    };
}
pub(crate) use jump;

/// The programs of this object, as `bpf_tail_call` takes them.
#[inline(always)]
pub(crate) fn programs() -> *const core::ffi::c_void {
    #[cfg(not(feature = "flat"))]
    let programs = &raw const PROGRAMS;
    #[cfg(feature = "flat")]
    let programs = &raw const PROGRAMS_FLAT;
    programs.cast()
}

/// What the filter says of an address: bits of [`filter`].
#[inline(always)]
pub(crate) fn filter<A: proxy_common::Address>(addr: &A) -> u8 {
    let (word, shift) = filter::bucket(addr);
    tally(Tally::Filter);
    match FILTER.get(word) {
        Some(word) => filter::bits(*word, shift),
        None => 0,
    }
}

/// Counts an outcome.
#[inline(always)]
pub(crate) fn count(outcome: Outcome) {
    tally(Tally::Stats);
    if let Some(counter) = STATS.get_ptr_mut(outcome as u32) {
        // SAFETY: this CPU's own counter; programs on one CPU do not interleave.
        unsafe { *counter += 1 }
    }
}

/// Counts a port's new flow or refused packet.
#[inline(always)]
pub(crate) fn count_port(port_id: u32, refused: bool) {
    tally(Tally::Stats);
    if let Some(stats) = PORT_STATS.get_ptr_mut(port_id) {
        // SAFETY: this CPU's own counters.
        unsafe {
            if refused {
                (*stats).refused += 1;
            } else {
                (*stats).new_flows += 1;
            }
        }
    }
}

/// A Service port.
#[inline(always)]
pub(crate) fn port(port_id: u32) -> Option<*const Port> {
    tally(Tally::Ports);
    PORTS.get_ptr(port_id)
}

/// An endpoint's generation.
#[inline(always)]
pub(crate) fn generation(endpoint_id: u32) -> Option<u32> {
    tally(Tally::Live);
    // SAFETY: an array's element; the word is read once and whole.
    LIVE.get_ptr(endpoint_id).map(|live| unsafe { (&raw const (*live).generation).read_volatile() })
}

/// True if some protocol has this NodePort.
#[inline(always)]
pub(crate) fn is_node_port(port: u16) -> bool {
    tally(Tally::NodePorts);
    match NODE_PORTS.get(u32::from(port) >> 6) {
        Some(word) => *word >> (port & 63) & 1 != 0,
        None => false,
    }
}

/// What the agent knows of a device.
#[inline(always)]
pub(crate) fn device(ifindex: u32) -> Option<&'static Device> {
    tally(Tally::Devices);
    // SAFETY: the map is not preallocated: an element that is removed meanwhile stays readable until we are done (RCU).
    unsafe { DEVICES.get(ifindex) }
}

/// This CPU's bucket of answers.
#[inline(always)]
pub(crate) fn reject_bucket() -> Option<*mut RejectBucket> {
    tally(Tally::Rejects);
    REJECTS.get_ptr_mut(0)
}

/// The time as it was read last.
#[inline(always)]
pub(crate) fn clock() -> Option<*mut u64> {
    tally(Tally::Scratch);
    CLOCK.get_ptr_mut(0)
}

/// Counts up for an endpoint, by its hash. Two CPUs may read the same number: what it stands for is reserved anyhow.
#[inline(always)]
pub(crate) fn next_of(endpoint: u32) -> u32 {
    tally(Tally::Scratch);
    let Some(cursor) = CURSORS.get_ptr_mut(endpoint & (CURSOR_COUNT - 1)) else { return 0 };
    // SAFETY: an array's element; one aligned word.
    unsafe {
        let next = cursor.read_volatile();
        cursor.write_volatile(next.wrapping_add(1));
        next
    }
}

/// Remembers that a direct flow's port was exchanged: from now on direct packets are looked up.
#[inline(always)]
pub(crate) fn note_direct_rewrite() {
    tally(Tally::Config);
    if let Some(config) = CONFIG.get_ptr_mut(0) {
        // SAFETY: an array's element; only programs write this word, and only this value.
        unsafe { (&raw mut (*config).direct_rewrites).write_volatile(1) }
    }
}
