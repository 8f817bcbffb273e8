//! The node that the agent runs on, as far as the proxy reads its Node object.

use std::net::IpAddr;
use std::sync::Arc;

use ipnet::IpNet;

use super::ObjectName;

/// The own Node.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Node {
    /// Its name; it is in no namespace.
    pub name: ObjectName,
    /// The node's IP of each family that it has one of: at most two.
    pub addresses: Vec<IpAddr>,
    /// The zone it stands in (rule 57).
    pub zone: Option<Arc<str>>,
    /// `spec.podCIDRs`: the addresses of its pods, for `--detect-local-mode node-cidr` (rule 71).
    pub pod_cidrs: Vec<IpNet>,
    /// It is being deleted, or about to be: load balancers are to leave it (rule 118).
    pub leaving: bool,
}
