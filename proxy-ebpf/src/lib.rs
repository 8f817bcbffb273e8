//! What the host can build and test of the programs: parsing. The rest needs the kernel and is tested there, packet
//! by packet.

#![cfg_attr(target_arch = "bpf", no_std)]

#[macro_use]
pub mod mutants;

pub mod ctx;
pub mod packet;
