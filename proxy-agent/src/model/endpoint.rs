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
    /// `hints.forNodes`: whether it names this node (rule 58).
    pub for_node: Hint,
    /// `hints.forZones`: place in [`EndpointSlice::zone_hints`] plus one; 0 without.
    pub zones: u16,
}

/// What a topology hint says of a place.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord)]
pub enum Hint {
    /// There is no hint.
    #[default]
    None,
    /// It names others only.
    Elsewhere,
    /// It names this one.
    Here,
}

impl Hint {
    /// The hint with these names, as this place reads it.
    pub fn of<'a>(names: impl IntoIterator<Item = &'a str>, here: Option<&str>) -> Self {
        names
            .into_iter()
            .take(if mutant!("rule-58") { 1 } else { usize::MAX })
            .fold(Self::None, |hint, name| hint.max(if here == Some(name) { Self::Here } else { Self::Elsewhere }))
    }
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
    /// The sets of zones that `hints.forZones` of the endpoints name, each set once: there are few, and many endpoints.
    pub zone_hints: Vec<Box<[Box<str>]>>,
    /// Since when the cluster has wanted it so.
    pub trigger: Trigger,
}

impl EndpointSlice {
    /// What an endpoint's `hints.forZones` say of a zone.
    pub fn zone_hint(&self, endpoint: &Endpoint, zone: Option<&str>) -> Hint {
        let set = usize::from(endpoint.zones).checked_sub(1).and_then(|place| self.zone_hints.get(place));
        Hint::of(set.into_iter().flatten().map(|name| &**name), zone)
    }
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
