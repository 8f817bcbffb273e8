//! The matrix tier: how CNIs wire pods × what netfilter does in the nodes, and in each such topology every client, endpoint,
//! kind of Service address, family and transport, with real sockets between two nodes and a host outside.
//!
//! One topology is one test. Its cells are generated (`cells.rs`), run side by side, and are judged by kube-proxy's rules
//! ([`fairlead_tests::rules`]) and by what the endpoint sees of direct traffic (`direct.rs`). `FAIRLEAD_MATRIX_WITH=kube-proxy`
//! runs the same cells with kube-proxy in the agents' place. What came of both stands in `docs/cni-matrix.md` (`page.rs`).

/// One test for each topology.
macro_rules! topologies {
    ($($shape:ident: $wiring:ident),+ $(,)?) => {
        /// Every shape, in the order of the page.
        #[cfg(test)]
        const SHAPES: &[(&str, shape::Wiring)] = &[$((stringify!($shape), shape::Wiring::$wiring)),+];

        $(#[cfg(test)]
        mod $shape {
            topologies!(@filters $shape none: None, conntrack: Conntrack, invalid_drop: InvalidDrop, policy: Policy);
        })+
    };
    (@filters $shape:ident $($name:ident: $filter:ident),+) => {
        $(#[test]
        fn $name() {
            let name = concat!(stringify!($shape), "::", stringify!($name));
            let wiring = crate::shape::wiring(stringify!($shape));
            crate::run::run(&crate::shape::Topology { name, wiring, filter: crate::shape::Filter::$filter });
        })+
    };
}

topologies! {
    routed: Routed,
    bridge: Bridge,
    bridge_nf: BridgeNf,
    plugin_bridge: PluginBridge,
    plugin_ptp: PluginPtp,
    vxlan: Vxlan,
    routed_vxlan: RoutedVxlan,
    tun: Tun,
    two_uplinks: TwoUplinks,
    foreign_tcx: ForeignTcx,
    foreign_clsact: ForeignClsact,
}

#[cfg(test)]
mod cells;
#[cfg(test)]
mod direct;
#[cfg(test)]
#[cfg(test)]
mod page;
#[cfg(test)]
mod proxy;
#[cfg(test)]
mod run;
#[cfg(test)]
mod shape;
#[cfg(test)]
mod tracked;
