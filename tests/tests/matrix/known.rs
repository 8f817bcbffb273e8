//! Cells that do not come as the rules say, and are known. One all of whose cells come right is an error too: then its line
//! goes.

use fairlead_tests::rules::Client;

use crate::{
    cells::Cell,
    shape::{Filter, Topology, Wiring},
};

/// What is known of some topologies.
pub(crate) struct Known {
    pub(crate) why: &'static str,
    topology: fn(&Topology) -> bool,
    cell: fn(&Cell) -> bool,
}

pub(crate) const KNOWN: &[Known] = &[Known {
    why: "a pod's request to itself is turned round at its device before a foreign program there sees it, so the program \
              takes the answer for a stranger's",
    topology: |topology| matches!(topology.wiring, Wiring::ForeignTcx | Wiring::ForeignClsact),
    cell: |cell| matches!(cell.route.client, Client::Server(_)),
}];

/// Those of this topology.
pub(crate) fn of(topology: &Topology) -> impl Iterator<Item = &'static Known> {
    let topology = *topology;
    KNOWN.iter().filter(move |known| (known.topology)(&topology))
}

impl Known {
    /// Is it about the topology of this shape and filter?
    pub(crate) fn is_about(&self, shape: &str, filter: &str) -> bool {
        Filter::ALL.into_iter().filter(|one| one.name() == filter).any(|filter| {
            let wiring = crate::shape::wiring(shape);
            (self.topology)(&Topology { name: "", wiring, filter })
        })
    }

    /// Is it about this cell?
    pub(crate) fn covers(&self, cell: &Cell) -> bool {
        (self.cell)(cell)
    }
}
