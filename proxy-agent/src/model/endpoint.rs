//! EndpointSlices, as far as the proxy reads them.

use std::net::IpAddr;
use std::sync::Arc;
use std::time::Duration;

use super::{IpFamily, ObjectName, Protocol};

/// A port of an EndpointSlice; matched with a Service's port by name and protocol (rule 40).
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct SlicePort {
    /// Name; empty for the only port without one.
    pub name: Arc<str>,
    /// Protocol.
    pub protocol: Protocol,
    /// The port on which the endpoints listen.
    pub port: u16,
}

/// One endpoint of a slice, with the defaults of its conditions filled in (rule 42).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Endpoint {
    /// Its first address (rule 41).
    pub addr: IpAddr,
    /// `conditions.ready`, true if absent.
    pub ready: bool,
    /// `conditions.serving`, true if absent.
    pub serving: bool,
    /// `conditions.terminating`, false if absent.
    pub terminating: bool,
    /// `nodeName` is this node's (rule 43).
    pub local: bool,
    /// It carries topology hints, which are not followed yet.
    pub hinted: bool,
}

/// An EndpointSlice that belongs to a Service. Those without the label (rule 37), with the headless label (rule 1) or
/// of another address type (rule 38) never become one.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct EndpointSlice {
    /// Its own name.
    pub name: ObjectName,
    /// The Service it belongs to.
    pub service: ObjectName,
    /// `addressType`.
    pub family: IpFamily,
    /// Made from an `Endpoints` object: counts only where the Service has no EndpointSlice, because a cluster's
    /// controllers mirror the one into the other (rule 5).
    pub legacy: bool,
    /// `ports`.
    pub ports: Vec<SlicePort>,
    /// `endpoints`.
    pub endpoints: Vec<Endpoint>,
    /// Since when the cluster has wanted it so.
    pub trigger: Trigger,
}

/// When that happened which made a slice what it is, as its writer says (rule 135): time since 1970. It says nothing of the
/// endpoints: slices that differ here alone are equal.
#[derive(Clone, Copy, Debug, Default)]
pub struct Trigger(pub Option<Duration>);

impl PartialEq for Trigger {
    fn eq(&self, _: &Self) -> bool {
        true
    }
}

impl Eq for Trigger {}
