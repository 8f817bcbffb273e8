//! The contract between Fairlead's eBPF programs and its agent.
//!
//! Every byte that both sides read is described here, once:
//!
//! * **Byte order.** Addresses are octets in network order. Everything else (ports, ids, counters, times) is in the
//!   host's order, so that `bpftool map dump` shows port 443 as `443`. Packet bytes become these types in the parser
//!   and turn back in the rewrite step, nowhere else.
//! * **Padding.** No struct has hidden padding: [`abi_struct!`] proves size, alignment and the sum of the fields at
//!   compile time. Pad fields are named `_pad…` and always zero, because map keys are compared as bytes.
//! * **Time.** `*_secs` is seconds of `CLOCK_MONOTONIC`, which `bpf_ktime_get_coarse_ns` reads too.
//! * **Changing it.** Adding a map, an [`Outcome`] or a flag keeps [`ABI_VERSION`]. Changing the size or meaning of a
//!   field bumps it, together with `tests/golden/object.txt` and `docs/map-abi.md`.

#![cfg_attr(not(test), no_std)]

pub mod abi;
pub mod algo;
mod family;
mod layout;
pub mod mutant;
mod outcome;
#[cfg(feature = "user")]
mod pod;

pub use family::{Addr4, Addr6, Address, Family, V4, V6};
pub use outcome::{CODES, Kind, Outcome};

/// Version of every layout in this crate; kept in `CONFIG` and compared before an agent touches pinned maps.
pub const ABI_VERSION: u32 = 3;
