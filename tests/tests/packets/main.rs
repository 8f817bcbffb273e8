//! The packet tier: byte-exact packets through the loaded programs by `BPF_PROG_TEST_RUN`, without attaching anything.
//!
//! Every test has a node of its own: a network namespace with devices, routes and neighbours, freshly loaded programs,
//! and maps that the agent's planner wrote from a manifest. Needs root.

/// One test of a case for each family: `v4` and `v6`.
macro_rules! families {
    ($($case:ident),+ $(,)?) => { $(
        mod $case {
            use proxy_agent::model::IpFamily;
            #[test]
            fn v4() {
                super::$case(IpFamily::V4);
            }
            #[test]
            fn v6() {
                super::$case(IpFamily::V6);
            }
        }
    )+ };
}

/// One test of a case for each family and transport.
macro_rules! wires {
    ($($case:ident),+ $(,)?) => { $(
        mod $case {
            use fairlead_tests::packet::Wire;
            #[test]
            fn tcp_v4() {
                super::$case(Wire::TCP_V4);
            }
            #[test]
            fn tcp_v6() {
                super::$case(Wire::TCP_V6);
            }
            #[test]
            fn udp_v4() {
                super::$case(Wire::UDP_V4);
            }
            #[test]
            fn udp_v6() {
                super::$case(Wire::UDP_V6);
            }
        }
    )+ };
}

#[cfg(test)]
mod affinity;
#[cfg(test)]
mod bridge;
#[cfg(test)]
mod cases;
#[cfg(test)]
mod classes;
#[cfg(test)]
mod evictions;
mod flows;
#[cfg(test)]
mod handshake;
#[cfg(test)]
mod headers;
#[cfg(test)]
mod icmp;
#[cfg(test)]
mod itself;
#[cfg(test)]
mod limits;
#[cfg(test)]
mod mark;
#[cfg(test)]
mod masquerade;
#[cfg(test)]
mod node;
#[cfg(test)]
mod outcomes;
#[cfg(test)]
mod plan;
#[cfg(test)]
mod policy;
#[cfg(test)]
mod properties;
#[cfg(test)]
mod reject;
#[cfg(test)]
mod tuples;
