//! Cells that do not come as the rules say, and are known. One all of whose cells come right is an error too: then its line
//! goes.

use fairlead_tests::rules::{Address, Client, Endpoint};

use crate::{
    cells::{Cell, Route},
    shape::{Filter, Topology, Wiring},
};

/// What is known of some topologies.
pub(crate) struct Known {
    pub(crate) why: &'static str,
    topology: fn(&Topology) -> bool,
    cell: fn(&Cell) -> bool,
}

pub(crate) const KNOWN: &[Known] = &[
    Known {
        why: "replies are not led back to the uplink that the request came by yet",
        topology: |topology| topology.wiring == Wiring::TwoUplinks,
        cell: |cell| {
            let Route { client, endpoint, address, .. } = cell.route;
            let from_afar = |at| client == Client::Outside(at) || client.node() != at;
            matches!((address, endpoint), (Address::NodePort(at), Endpoint::Pod(own)) if own == at && from_afar(at))
        },
    },
    Known {
        why: "a pod's request to itself is turned round at its device before a foreign program there sees it, so the program \
              takes the answer for a stranger's",
        topology: |topology| matches!(topology.wiring, Wiring::ForeignTcx | Wiring::ForeignClsact),
        cell: |cell| matches!(cell.route.client, Client::Server(_)),
    },
    Known {
        why: "over IPv6 a masqueraded client is shown to a pod here with the uplink's address, where the kernel prefers the \
              tunnel's, which is nearer to the pod's",
        topology: |topology| matches!(topology.wiring, Wiring::RoutedVxlan | Wiring::Tun),
        cell: |cell| cell.v6,
    },
];

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
