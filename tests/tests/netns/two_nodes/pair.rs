//! The two nodes, and their agents on one folder of manifests.

use std::{
    collections::{BTreeMap, BTreeSet},
    ops::Deref,
    sync::{Mutex, PoisonError},
};

use anyhow::{Result, ensure};
use fairlead_lab::{Agent, LabConfig, Manifests, ServiceSpec, server::wait_until};
pub(super) use fairlead_tests::nodes::spec;
use fairlead_tests::{listed, nodes::Nodes};

use super::rules::Endpoint;
use crate::cell::{Cell, PATIENCE};

/// The pairs that tests share, made when first needed. A test that panics leaves its pair to the next one.
static SHARED: [Mutex<Option<Pair>>; 2] = [const { Mutex::new(None) }; 2];

/// How the pods of a shared pair are wired.
#[derive(Clone, Copy, Debug)]
pub(super) enum Shared {
    Routed = 0,
    Bridged = 1,
}

impl Shared {
    fn cell(self) -> Cell {
        Cell::named(match self {
            Self::Routed => "routed_invalid_drop",
            Self::Bridged => "bridge_nf_invalid_drop",
        })
    }
}

/// Two nodes. Its parts are dropped in this order: an agent cleans up in its node.
pub(super) struct Pair {
    pub(super) cell: Cell,
    pub(super) agents: Vec<Agent>,
    pub(super) manifests: Manifests,
    nodes: Nodes,
}

impl Deref for Pair {
    type Target = Nodes;

    fn deref(&self) -> &Nodes {
        &self.nodes
    }
}

impl Pair {
    /// Builds the nodes, and starts their agents with further arguments.
    pub(super) fn new(cell: Cell, args: &[&str]) -> Result<Self> {
        let config = LabConfig { pods: 1, switch: true, ..LabConfig::new(cell.shape, cell.netfilter) };
        let mut nodes = Nodes::new(config)?;
        nodes.serve()?;
        nodes.everybody_reaches_every_server()?;
        let manifests = Manifests::new(&nodes.labs[0].dir().join("manifests"))?;
        let mut pair = Self { cell, agents: Vec::new(), manifests, nodes };
        // As many refusals at once as these tests ask for are no attack.
        let args = [args, &["--rejects-per-second=100000"]].concat();
        pair.agents = pair.nodes.start_agents(&args, &pair.manifests)?;
        Ok(pair)
    }

    /// Runs a test on the pair of this kind that is shared, with agents as they are without further arguments.
    pub(super) fn shared(cell: Shared, test: impl FnOnce(&Self) -> Result<()>) {
        let mut shared = SHARED[cell as usize].lock().unwrap_or_else(PoisonError::into_inner);
        let pair = match &mut *shared {
            Some(pair) => pair,
            none => none.insert(Self::new(cell.cell(), &[]).unwrap_or_else(|error| panic!("{cell:?}: {error:#}"))),
        };
        test(pair).unwrap_or_else(|error| panic!("[{}] {error:#}\n{}", pair.cell.name, pair.last_words()));
    }

    /// Writes Services, and waits until both agents serve them with just these endpoints.
    pub(super) fn serve(&self, services: &[(ServiceSpec, &[Endpoint])]) -> Result<()> {
        for (service, endpoints) in services {
            self.manifests.apply(service, &self.slices(endpoints))?;
        }
        self.until_offered(services)
    }

    /// Rewrites the endpoints of a Service, and waits until both agents offer just these.
    pub(super) fn offer(&self, service: &ServiceSpec, endpoints: &[Endpoint]) -> Result<()> {
        self.manifests.endpoints(service, &self.slices(endpoints))?;
        self.until_offered(&[(service.clone(), endpoints)])
    }

    fn until_offered(&self, services: &[(ServiceSpec, &[Endpoint])]) -> Result<()> {
        let addresses = |e: &Endpoint| [false, true].map(|v6| self.endpoint(*e, v6).to_string());
        let wanted: BTreeMap<_, BTreeSet<_>> = services
            .iter()
            .map(|(service, endpoints)| (service.name.clone(), endpoints.iter().flat_map(addresses).collect()))
            .collect();
        for agent in &self.agents {
            // One without endpoints stands in the list of Services alone.
            let offered = || -> Result<BTreeMap<String, BTreeSet<String>>> {
                let mut found: BTreeMap<_, BTreeSet<_>> = BTreeMap::new();
                for what in ["services", "endpoints"] {
                    for row in listed::rows(agent, what)? {
                        let Some(name) = row["service"].as_str().filter(|name| wanted.contains_key(*name)) else {
                            continue;
                        };
                        let addresses = found.entry(name.to_owned()).or_default();
                        if let (Some(address), "endpoints") = (row["address"].as_str(), what) {
                            addresses.insert(address.to_owned());
                        }
                    }
                }
                Ok(found)
            };
            let seen = wait_until(PATIENCE, || offered().is_ok_and(|found| found == wanted));
            ensure!(seen, "an agent still offers {:?}, not {wanted:?}", offered()?);
        }
        Ok(())
    }

    /// Nobody knows any more what it was told of routes.
    pub(super) fn forget_routes(&self) -> Result<()> {
        for lab in &self.nodes.labs {
            for host in lab.all_pods().map(|pod| &pod.host).chain([&lab.node, &lab.ext]) {
                for family in ["-4", "-6"] {
                    host.ns.output("ip", &[family, "route", "flush", "cache"])?;
                }
            }
        }
        Ok(())
    }

    /// The last lines of both agents' logs.
    pub(super) fn last_words(&self) -> String {
        self.agents.iter().map(Agent::last_words).collect()
    }
}
