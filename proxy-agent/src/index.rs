//! All objects that the sources have told of, and for each event: which Services it changed.
//!
//! Work is proportional to the change. A relist is buffered and compared when it is complete, so one that brings
//! nothing new changes nothing.

use std::collections::{BTreeMap, BTreeSet, HashMap, HashSet};
use std::net::IpAddr;

use ipnet::IpNet;

use crate::dataplane::Tuple;
use crate::model::{EndpointSlice, Families, IpFamily, Node, ObjectName, Service, ServiceCidr};
use crate::plan::addresses;

mod triggers;

pub use triggers::Triggers;

#[cfg(test)]
mod tests;

/// What a source lists and watches.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Kind {
    /// Services.
    Service,
    /// EndpointSlices, and Endpoints made into slices.
    EndpointSlice,
    /// The own Node.
    Node,
    /// Ranges that ClusterIPs come from.
    ServiceCidr,
}

impl Kind {
    /// Every kind; those first for which nothing waits that has Services and EndpointSlices.
    pub const ALL: [Self; 4] = [Self::Node, Self::ServiceCidr, Self::Service, Self::EndpointSlice];

    /// As Kubernetes calls it.
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::Service => "Service",
            Self::EndpointSlice => "EndpointSlice",
            Self::Node => "Node",
            Self::ServiceCidr => "ServiceCIDR",
        }
    }
}

/// An object.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Object {
    /// A Service.
    Service(Service),
    /// An EndpointSlice.
    Slice(EndpointSlice),
    /// The own Node.
    Node(Node),
    /// A range that ClusterIPs come from.
    ServiceCidr(ServiceCidr),
}

impl Object {
    /// Its kind.
    pub const fn kind(&self) -> Kind {
        match self {
            Self::Service(_) => Kind::Service,
            Self::Slice(_) => Kind::EndpointSlice,
            Self::Node(_) => Kind::Node,
            Self::ServiceCidr(_) => Kind::ServiceCidr,
        }
    }

    /// Its own name.
    pub const fn name(&self) -> &ObjectName {
        match self {
            Self::Service(service) => &service.name,
            Self::Slice(slice) => &slice.name,
            Self::Node(node) => &node.name,
            Self::ServiceCidr(cidr) => &cidr.name,
        }
    }
}

/// Something that a source has to tell.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Event {
    /// A full list begins.
    Init(Kind),
    /// An object of that list.
    InitApply(Object),
    /// An object of that list that could not be read: what is known of it stays.
    InitKeep(Kind, ObjectName),
    /// The list is complete: what it did not name is gone.
    InitDone(Kind),
    /// An object came or changed.
    Apply(Object),
    /// An object went, or is no longer for a proxy to serve.
    Delete(Kind, ObjectName),
    /// The node's own addresses, all of them, with the bits of `abi::NodeAddr`.
    NodeAddrs(BTreeMap<IpAddr, u32>),
}

/// Numbers of objects.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct ObjectCount {
    /// Services.
    pub services: u64,
    /// EndpointSlices.
    pub slices: u64,
}

impl ObjectCount {
    /// The sum of both.
    #[must_use]
    pub const fn plus(self, other: Self) -> Self {
        Self { services: self.services + other.services, slices: self.slices + other.slices }
    }
}

/// What an event changed.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Changed {
    /// Services to plan again, whether they are still there or not.
    pub services: BTreeSet<ObjectName>,
    /// The node's addresses, or what its Node says of them.
    pub node: bool,
    /// The ranges that ClusterIPs come from.
    pub service_cidrs: bool,
    /// How many objects came, changed or went.
    pub objects: ObjectCount,
    /// The families that may be behind: those of a slice, both for anything else.
    pub families: Families,
    /// Since when the cluster has wanted the changes.
    pub triggers: Triggers,
}

impl Changed {
    /// Adds what another event changed.
    pub fn merge(&mut self, other: Self) {
        // Not `append`, which rebuilds the whole set for one element.
        self.services.extend(other.services);
        self.node |= other.node;
        self.service_cidrs |= other.service_cidrs;
        self.objects = self.objects.plus(other.objects);
        self.families = self.families.or(other.families);
        self.triggers.merge(other.triggers);
    }

    /// True if nothing changed.
    pub fn is_empty(&self) -> bool {
        self.services.is_empty() && !self.node && !self.service_cidrs
    }
}

/// Something that only one Service can have.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Claim {
    /// A ClusterIP.
    ClusterIp(IpAddr),
    /// An address, port and protocol.
    Tuple(Tuple),
}

/// A list that is being received.
#[derive(Debug, Default)]
struct Relist {
    objects: HashMap<ObjectName, Object>,
    kept: HashSet<ObjectName>,
}

/// The objects.
#[derive(Debug, Default)]
pub struct Index {
    services: HashMap<ObjectName, Service>,
    slices: HashMap<ObjectName, EndpointSlice>,
    /// Slices of each Service by name, whether the Service is known or not (rule 47).
    slices_of: HashMap<ObjectName, BTreeSet<ObjectName>>,
    /// Who asks for what: the oldest first, then by name.
    claims: HashMap<Claim, Vec<(i64, ObjectName)>>,
    node_addrs: Option<BTreeMap<IpAddr, u32>>,
    node: Option<Node>,
    service_cidrs: BTreeMap<ObjectName, ServiceCidr>,
    relists: BTreeMap<Kind, Relist>,
    complete: BTreeSet<Kind>,
}

impl Index {
    /// True once every source has delivered its first full list. The own Node is not waited for here (rule 148).
    pub fn is_synced(&self) -> bool {
        self.complete.contains(&Kind::Service)
            && self.complete.contains(&Kind::EndpointSlice)
            && self.node_addrs.is_some()
    }

    /// A Service.
    pub fn service(&self, name: &ObjectName) -> Option<&Service> {
        self.services.get(name)
    }

    /// Names of all Services.
    pub fn service_names(&self) -> impl Iterator<Item = &ObjectName> {
        self.services.keys()
    }

    /// Number of Services and of EndpointSlices.
    pub fn counts(&self) -> (usize, usize) {
        (self.services.len(), self.slices.len())
    }

    /// The slices of a Service in one family, by name. Those made from Endpoints count only where there is no other.
    pub fn slices(&self, service: &ObjectName, family: IpFamily) -> Vec<&EndpointSlice> {
        let names = self.slices_of.get(service).into_iter().flatten();
        let mut slices: Vec<_> = names
            .filter_map(|name| self.slices.get(name))
            .filter(|slice| slice.family == family || mutant!("rule-96"))
            .collect();
        if slices.iter().any(|slice| !slice.legacy) && !mutant!("rule-5") {
            slices.retain(|slice| !slice.legacy);
        }
        slices
    }

    /// The Service that has it, of all that ask for it: the oldest, then the first by name (rule 32).
    pub fn owner(&self, claim: &Claim) -> Option<&ObjectName> {
        let claimants = self.claims.get(claim)?;
        if mutant!("rule-32") { claimants.last() } else { claimants.first() }.map(|(_, name)| name)
    }

    /// The node's own addresses.
    pub fn node_addrs(&self) -> Option<&BTreeMap<IpAddr, u32>> {
        self.node_addrs.as_ref()
    }

    /// The own Node. One that was deleted stays known (rule 118).
    pub const fn node(&self) -> Option<&Node> {
        self.node.as_ref()
    }

    /// The ranges that ClusterIPs come from, each once. Empty where the source knows of none: then nothing follows from it.
    pub fn service_cidrs(&self) -> BTreeSet<IpNet> {
        self.service_cidrs.values().flat_map(|object| object.cidrs.iter().copied()).collect()
    }

    /// Takes an event in.
    pub fn apply(&mut self, event: Event) -> Changed {
        let mut changed = Changed::default();
        match event {
            Event::Init(kind) => {
                self.relists.insert(kind, Relist::default());
            }
            Event::InitApply(object) => {
                let relist = self.relists.entry(object.kind()).or_default();
                relist.objects.insert(object.name().clone(), object);
            }
            Event::InitKeep(kind, name) => {
                self.relists.entry(kind).or_default().kept.insert(name);
            }
            Event::InitDone(kind) => self.swap(kind, &mut changed),
            Event::Apply(object) => self.put(object, &mut changed),
            Event::Delete(kind, name) => self.remove(kind, &name, &mut changed),
            Event::NodeAddrs(addrs) => {
                changed.node = self.node_addrs.as_ref() != Some(&addrs);
                changed.families = if changed.node { Families::BOTH } else { Families::NONE };
                if changed.node {
                    self.follow_own_addresses(&mut changed);
                }
                self.node_addrs = Some(addrs);
            }
        }
        changed
    }

    fn swap(&mut self, kind: Kind, changed: &mut Changed) {
        let first = self.complete.insert(kind);
        // Also an empty list says something: what an earlier agent left is not in it.
        changed.service_cidrs |= first && kind == Kind::ServiceCidr;
        let Some(relist) = self.relists.remove(&kind) else { return };
        let known: Vec<_> = match kind {
            Kind::Service => self.services.keys().cloned().collect(),
            Kind::EndpointSlice => self.slices.keys().cloned().collect(),
            Kind::Node => Vec::new(),
            Kind::ServiceCidr => self.service_cidrs.keys().cloned().collect(),
        };
        for name in known {
            if !relist.objects.contains_key(&name) && !relist.kept.contains(&name) && !mutant!("rule-6") {
                self.remove(kind, &name, changed);
            }
        }
        for object in relist.objects.into_values() {
            self.put(object, changed);
        }
    }

    fn put(&mut self, object: Object, changed: &mut Changed) {
        match object {
            Object::Service(service) => self.put_service(service, changed),
            Object::Slice(slice) => self.put_slice(slice, changed),
            Object::Node(node) => self.put_node(node, changed),
            Object::ServiceCidr(_) if mutant!("rule-3") => {}
            Object::ServiceCidr(cidr) => {
                changed.service_cidrs |= self.service_cidrs.get(&cidr.name) != Some(&cidr);
                self.service_cidrs.insert(cidr.name.clone(), cidr);
            }
        }
    }

    fn put_node(&mut self, node: Node, changed: &mut Changed) {
        let known = self.node.as_ref();
        if known == Some(&node) {
            return;
        }
        changed.node = true;
        changed.families = Families::BOTH;
        if known.and_then(|known| known.zone.as_deref()) != node.zone.as_deref() && !mutant!("rule-60") {
            // Seldom, so nobody keeps a list of them (rule 60).
            let hinted = self.slices.values().filter(|slice| !slice.zone_hints.is_empty());
            changed.services.extend(hinted.map(|slice| slice.service.clone()));
        }
        if known.map(|known| &known.addresses) != Some(&node.addresses) {
            self.follow_own_addresses(changed);
        }
        self.node = Some(node);
    }

    /// Source ranges may hold the node's own addresses, or no longer (rule 21).
    fn follow_own_addresses(&self, changed: &mut Changed) {
        let guarded = self.services.values().filter(|service| !service.source_ranges_asked.is_empty());
        changed.services.extend(guarded.map(|service| service.name.clone()));
    }

    fn put_service(&mut self, service: Service, changed: &mut Changed) {
        if self.services.get(&service.name) == Some(&service) && !mutant!("rule-33") {
            return;
        }
        changed.objects.services += 1;
        changed.families = Families::BOTH;
        self.unclaim(&service.name, changed);
        for claim in addresses::claims(&service) {
            let claimants = self.claims.entry(claim).or_default();
            changed.services.extend(claimants.iter().map(|(_, name)| name.clone()));
            let claimant = (service.created_secs, service.name.clone());
            if let Err(place) = claimants.binary_search(&claimant) {
                claimants.insert(place, claimant);
            }
        }
        changed.services.insert(service.name.clone());
        self.services.insert(service.name.clone(), service);
    }

    fn put_slice(&mut self, slice: EndpointSlice, changed: &mut Changed) {
        let known = self.slices.get(&slice.name);
        if known == Some(&slice) {
            return;
        }
        let early = mutant!("rule-47") && !self.services.contains_key(&slice.service);
        if early || mutant!("rule-50") && slice.endpoints.is_empty() {
            return;
        }
        changed.objects.slices += 1;
        // The label that names the Service may change in place: the Service it leaves must forget it (rule 49).
        if let Some(left) =
            known.map(|known| known.service.clone()).filter(|left| *left != slice.service && !mutant!("rule-49"))
        {
            self.detach(&left, &slice.name);
            changed.services.insert(left);
        }
        self.slices_of.entry(slice.service.clone()).or_default().insert(slice.name.clone());
        changed.services.insert(slice.service.clone());
        changed.families =
            changed.families.or(if mutant!("rule-116-slice") { Families::BOTH } else { Families::one(slice.family) });
        changed.triggers.put(&slice);
        self.slices.insert(slice.name.clone(), slice);
    }

    fn remove(&mut self, kind: Kind, name: &ObjectName, changed: &mut Changed) {
        match kind {
            Kind::Service if mutant!("rule-7") => {}
            Kind::Service => {
                self.unclaim(name, changed);
                if self.services.remove(name).is_some() {
                    changed.objects.services += 1;
                    changed.families = Families::BOTH;
                    changed.services.insert(name.clone());
                }
            }
            Kind::EndpointSlice => {
                if let Some(slice) = self.slices.remove(name) {
                    changed.objects.slices += 1;
                    self.detach(&slice.service, name);
                    changed.families = changed.families.or(Families::one(slice.family));
                    changed.triggers.removed(&slice);
                    changed.services.insert(slice.service);
                }
            }
            Kind::Node => {}
            Kind::ServiceCidr => changed.service_cidrs |= self.service_cidrs.remove(name).is_some(),
        }
    }

    fn detach(&mut self, service: &ObjectName, slice: &ObjectName) {
        if let Some(slices) = self.slices_of.get_mut(service) {
            slices.remove(slice);
            if slices.is_empty() {
                self.slices_of.remove(service);
            }
        }
    }

    /// Drops a Service's claims; whoever else asks for the same is planned again.
    fn unclaim(&mut self, name: &ObjectName, changed: &mut Changed) {
        let Some(service) = self.services.get(name) else { return };
        for claim in addresses::claims(service) {
            let Some(claimants) = self.claims.get_mut(&claim) else { continue };
            claimants.retain(|(_, claimant)| claimant != name);
            changed.services.extend(claimants.iter().map(|(_, name)| name.clone()));
            if claimants.is_empty() {
                self.claims.remove(&claim);
            }
        }
    }
}
