//! Cells that do not come as the rules say, and are known: just these, and just so. One that comes right is an error too:
//! then its line goes. They excuse nothing that a topology leaves behind.

use fairlead_tests::rules::{Address, Client, Node};

use crate::{
    cells::{Cell, Failure},
    shape::{Filter, Topology, Wiring},
};

/// What is known of some topologies.
pub(crate) struct Known {
    pub(crate) why: &'static str,
    /// What comes in the place of what the rules say.
    what: &'static str,
    topology: fn(&Topology) -> bool,
    cell: fn(&Cell) -> bool,
}

pub(crate) const KNOWN: &[Known] = &[Known {
    why: "a pod's request to itself is turned round at its device before a foreign program there sees it, so the program \
              takes the answer for a stranger's",
    what: "no answer",
    topology: |topology| matches!(topology.wiring, Wiring::ForeignTcx | Wiring::ForeignClsact),
    // By the other node's address it leaves this one.
    cell: |cell| {
        matches!(cell.route.client, Client::Server(_)) && cell.route.address != Address::NodePort(Node::B)
    },
}];

/// What is to come of a topology's cells where it is not what the rules say.
pub(crate) fn failures(topology: &Topology, cells: &[Cell]) -> Vec<Failure> {
    let known = |cell: &Cell| KNOWN.iter().find(|known| (known.topology)(topology) && (known.cell)(cell));
    let failed = |cell: &Cell| known(cell).map(|Known { what, why, .. }| Failure { cell: *cell, what, why: (*why).to_owned() });
    cells.iter().filter_map(failed).collect()
}

impl Known {
    /// Is it about this topology?
    pub(crate) fn is_about(&self, wiring: Wiring, filter: Filter) -> bool {
        (self.topology)(&Topology { name: "", wiring, filter })
    }
}
