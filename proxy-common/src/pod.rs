//! The list of types that user space reads from and writes to maps as plain bytes.

use crate::{Addr4, Addr6, Family, abi};

macro_rules! pod {
    ($($ty:ty),+ $(,)?) => { $(
        // SAFETY: repr(C), integers and byte arrays only, and `abi_struct!` proves that there is no padding.
        unsafe impl aya::Pod for $ty {}
    )+ };
}

pod! {
    Addr4, Addr6, abi::Service, abi::Port, abi::Run, abi::NodeAddr, abi::Live, abi::Device, abi::Config,
    abi::config::RejectBucket, abi::PortStats, abi::Name, abi::Affinity,
}

// SAFETY: as above; the family decides only how long the addresses are.
unsafe impl<F: Family> aya::Pod for abi::ServiceKey<F> {}
// SAFETY: as above.
unsafe impl<F: Family> aya::Pod for abi::Slot<F> {}
// SAFETY: as above.
unsafe impl<F: Family> aya::Pod for abi::FlowKey<F> {}
// SAFETY: as above.
unsafe impl<F: Family> aya::Pod for abi::Flow<F> {}
// SAFETY: as above.
unsafe impl<F: Family> aya::Pod for abi::SourceRange<F> {}
// SAFETY: as above.
unsafe impl<F: Family> aya::Pod for abi::AffinityKey<F> {}
