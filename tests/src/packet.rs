//! The packet tier's tools: packets as values, the loaded programs of one node, and what a run must have done.
//!
//! A test reads as a conversation: a packet arrives at a device, and leaves translated, refused, dropped or untouched.
//! Each assertion compares the whole frame, the verdict, `skb->tc_index` and every counter. Expected frames are built
//! from scratch: no arithmetic is shared with the programs.

mod build;
mod kernel;
mod maps;
mod netns;
mod node;
mod programs;
mod ran;
mod reuse;
mod service;
mod show;
mod wire;
pub mod world;

pub use build::{ACK, Checksum, FIN, L4, Mac, PSH, Packet, RST, SYN, crc32c, internet_checksum};
pub use maps::{Maps, Table};
pub use node::{Node, Settings};
pub use ran::{Ran, seen_outcomes};
pub use reuse::Elements;
pub use service::Service;
pub use show::{show, verify_checksums};
pub use wire::Wire;
