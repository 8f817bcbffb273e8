//! The writes of one change while it is put together, each kind apart, so that they come out in the one right order.

use std::collections::{BTreeMap, BTreeSet};
use std::net::IpAddr;

use proxy_common::abi;

use super::filter_bits::FilterBits;
use crate::dataplane::{Change, Free, MapOp, Slot, Subject, Tuple};
use crate::model::IpFamily;

/// A change that is being put together.
#[derive(Debug, Default)]
pub(super) struct Batch {
    /// Generations, slots, names, words of ports that no key leads to yet.
    pub(super) hidden: Vec<MapOp>,
    filter: Vec<(IpAddr, u8)>,
    /// New and changed keys of `SERVICES`.
    pub(super) puts: BTreeMap<Tuple, abi::Service>,
    /// Other keys and bits that packets can meet.
    pub(super) visible: Vec<MapOp>,
    /// Words of ports that are in use.
    pub(super) stores: Vec<MapOp>,
    deletes: BTreeSet<Tuple>,
    /// Other keys and bits that go.
    pub(super) removals: Vec<MapOp>,
    /// Words of ports that go.
    pub(super) zeroes: Vec<MapOp>,
    /// Generations of endpoints that went.
    pub(super) bumps: Vec<MapOp>,
    retire: Vec<MapOp>,
    frees: Vec<Free>,
}

impl Batch {
    /// An address gets a bit of `FILTER`.
    pub(super) fn filter(&mut self, addr: IpAddr, bit: u8) {
        self.filter.push((addr, bit));
    }

    /// A key of `SERVICES` goes, unless another port of this change takes it over.
    pub(super) fn delete_service(&mut self, tuple: Tuple) {
        self.deletes.insert(tuple);
    }

    /// The keys of `SERVICES` that go.
    pub(super) fn deletes(&self) -> impl Iterator<Item = &Tuple> {
        self.deletes.iter().filter(|tuple| !self.puts.contains_key(tuple))
    }

    /// Slots that no run names any more.
    pub(super) fn retire_slots(&mut self, family: IpFamily, base: u32, len: u32) {
        self.retire.extend((base..base + len).map(|index| MapOp::PutSlot { index, slot: Slot::unused(family) }));
        self.frees.push(Free::Slots { family, base, len });
    }

    /// An endpoint id that nobody uses any more.
    pub(super) fn retire_endpoint(&mut self, id: u32) {
        self.frees.push(Free::Endpoint { id });
    }

    /// A port id that nobody uses any more.
    pub(super) fn retire_port(&mut self, id: u32) {
        self.retire.push(MapOp::DeleteName { port_id: id });
        self.frees.push(Free::Port { id });
    }

    /// The change. Its order matters:
    /// * what a packet can reach is complete before the key that leads there exists;
    /// * `FILTER` knows an address before anything else does;
    /// * the run moves before the generations of endpoints that left it, so that a flow which lost its endpoint does
    ///   not choose the same one again;
    /// * a ClusterIP loses its ports before it is forgotten: a packet in between is refused, not let through.
    pub(super) fn into_change(self, subject: Subject, filter: &FilterBits) -> Change {
        let deletes: Vec<_> = self.deletes().map(|tuple| MapOp::DeleteService { tuple: *tuple }).collect();
        let mut prepare = self.hidden;
        prepare.extend(filter.stores_for(&self.filter));
        prepare.extend(self.puts.into_iter().map(|(tuple, service)| MapOp::PutService { tuple, service }));
        prepare.extend(self.visible);
        let mut commit = self.stores;
        commit.extend(deletes);
        commit.extend(self.removals);
        commit.extend(self.zeroes);
        commit.extend(self.bumps);
        Change { subject, prepare, commit, retire: self.retire, frees: self.frees }
    }
}
