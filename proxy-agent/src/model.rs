//! Plain types of the objects that the proxy reads: only the fields that kube-proxy reads.
//!
//! No kube, aya or tokio here: sources decode into these types, everything behind them knows nothing else.

mod endpoint;
mod name;
mod node;
mod service;
mod service_cidr;

pub use endpoint::{Endpoint, EndpointSlice, Hint, SlicePort, Trigger};
pub use name::{Families, IpFamily, NameError, ObjectName, PortKey, Protocol};
pub use node::Node;
pub use service::{Service, ServicePort, ServiceType};
pub use service_cidr::ServiceCidr;
