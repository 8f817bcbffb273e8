//! A range that ClusterIPs are allocated from.

use ipnet::IpNet;

use super::ObjectName;

/// A ServiceCIDR.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ServiceCidr {
    /// Its name; it is in no namespace.
    pub name: ObjectName,
    /// Its networks, host bits cleared: one, or one of each family.
    pub cidrs: Vec<IpNet>,
}
