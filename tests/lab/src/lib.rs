//! A small cluster in network namespaces: node, pods, external host; servers, clients and captures.
//!
//! ```text
//!   pod-a   pod-b   pod-c   client            ext  192.168.50.1   (more addresses on its lo: clients, remote pods)
//!     |       |       |       |                |
//!   routed veths, or ports of cni0   [node]  eth0  192.168.50.10
//! ```
//!
//! A lab with a switch takes a second node with pods of its own, 192.168.50.11: [`Lab::join`].
//!
//! Everything a [`Lab`] makes carries its id: namespaces, pins, directories. It is removed when the `Lab` is dropped,
//! when the process dies in whatever way (see [`janitor`]), or by the next process that makes a lab.
//! Nothing here knows of the proxy's insides: what it shows is what servers, clients and captures saw.

pub mod agent;
pub mod capture;
pub mod client;
pub mod conntrack;
pub mod frame;
pub mod http;
pub mod janitor;
pub mod load;
pub mod manifest;
pub mod netns;
pub mod packet;
pub mod probe;
pub mod schedule;
pub mod server;
pub mod sys;
pub mod topology;
pub mod tun;
pub mod wire;

pub use agent::{Agent, AgentOptions};
pub use capture::Capture;
pub use client::{Ask, Attempt, Conversation, Outcome};
pub use load::{Load, LoadPlan, Report};
pub use manifest::{Manifests, ServiceSpec};
pub use netns::Namespace;
pub use server::Server;
pub use topology::{Flat, Host, Lab, LabConfig, Netfilter, Pod, Shape};
pub use wire::{Answer, Proto};
