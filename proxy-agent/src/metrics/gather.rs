//! What is counted elsewhere and read when metrics are asked for: by the programs, by the control plane, by the sweep
//! over flows, by the devices' task.

use std::fmt;
use std::sync::{Mutex, PoisonError};
use std::time::Duration;

use aya::maps::{Map, MapData, MapError, PerCpuArray};
use prometheus_client::collector::Collector;
use prometheus_client::encoding::{DescriptorEncoder, EncodeMetric};
use prometheus_client::metrics::MetricType;
use prometheus_client::metrics::counter::ConstCounter;
use prometheus_client::metrics::gauge::ConstGauge;
use proxy_common::{Kind, Outcome};
use tokio::sync::{mpsc, oneshot, watch};

use crate::dataplane::pin::PinRoot;
use crate::devices::Census;
use crate::gc::FlowUse;
use crate::sync::{Figures, Input};

/// How long the control plane may take to answer: it may be in the middle of a large sync.
const PATIENCE: Duration = Duration::from_secs(2);

/// The counters of the programs.
pub struct Stats(PerCpuArray<MapData, u64>);

impl Stats {
    /// Opens the pinned map.
    pub fn open(pins: &PinRoot) -> Result<Self, MapError> {
        let data = MapData::from_pin(pins.map("STATS"))?;
        Ok(Self(PerCpuArray::try_from(Map::PerCpuArray(data))?))
    }

    /// Packets by outcome, over all CPUs.
    fn read(&self) -> Result<Vec<(Outcome, u64)>, MapError> {
        let read = |outcome: &Outcome| Ok((*outcome, self.0.get(&(*outcome as u32), 0)?.iter().sum()));
        Outcome::ALL.iter().filter(|outcome| **outcome != Outcome::NotOurs).map(read).collect()
    }
}

/// Who is asked.
pub struct Sources {
    /// The programs.
    pub stats: Stats,
    /// The control plane.
    pub control_plane: mpsc::Sender<Input>,
    /// The sweep over flows.
    pub flows: watch::Receiver<FlowUse>,
    /// The devices' task.
    pub devices: watch::Receiver<Census>,
}

impl Sources {
    /// Asks all of them. Whoever does not answer is left out.
    pub async fn ask(&self) -> Numbers {
        let packets = self.stats.read().unwrap_or_else(|error| {
            tracing::warn!(%error, "cannot read STATS");
            Vec::new()
        });
        let (flows, devices) = (self.flows.borrow().clone(), self.devices.borrow().clone());
        Numbers { packets, figures: self.figures().await, flows, devices }
    }

    async fn figures(&self) -> Option<Figures> {
        let (to, answer) = oneshot::channel();
        let asked = async {
            self.control_plane.send(Input::Figures(to)).await.ok()?;
            answer.await.ok()
        };
        tokio::time::timeout(PATIENCE, asked).await.ok().flatten()
    }
}

/// What they said.
#[derive(Clone, Debug, Default)]
pub struct Numbers {
    packets: Vec<(Outcome, u64)>,
    figures: Option<Figures>,
    flows: FlowUse,
    devices: Census,
}

/// The same as a part of the registry.
#[derive(Debug, Default)]
pub struct Gathered(Mutex<Numbers>);

impl Gathered {
    /// What is shown from now on.
    pub fn set(&self, numbers: Numbers) {
        *self.0.lock().unwrap_or_else(PoisonError::into_inner) = numbers;
    }
}

/// The name of a kind of outcome.
const fn kind_name(kind: Kind) -> &'static str {
    match kind {
        Kind::Pass => "pass",
        Kind::Translate => "translate",
        Kind::Reject => "reject",
        Kind::Drop => "drop",
    }
}

impl Collector for Gathered {
    fn encode(&self, mut to: DescriptorEncoder<'_>) -> fmt::Result {
        let numbers = self.0.lock().unwrap_or_else(PoisonError::into_inner).clone();
        let packets = numbers.packets.iter();
        let packets = packets.map(|(o, n)| ([("outcome", o.name()), ("kind", kind_name(o.kind()))], *n));
        counters(
            &mut to,
            "fairlead_packets",
            "Packets that the programs have judged, by what became of them",
            packets,
        )?;
        if let Some(figures) = &numbers.figures {
            control_plane(&mut to, figures)?;
        }
        let flows = numbers.flows.maps.iter().copied();
        let maps = numbers.figures.iter().flat_map(|figures| figures.maps.iter().copied()).chain(flows);
        let maps = maps.chain([numbers.devices.map]).filter(|of| of.capacity != 0);
        let (entries, capacities): (Vec<_>, Vec<_>) =
            maps.map(|of| (([("map", of.map)], of.entries), ([("map", of.map)], of.capacity))).unzip();
        gauges(&mut to, "fairlead_map_entries", "Entries of a map that are in use", entries)?;
        gauges(&mut to, "fairlead_map_capacity", "Entries that a map has room for", capacities)?;
        let devices = numbers.devices.devices.iter();
        let devices = devices.map(|((role, state), n)| ([("role", *role), ("state", *state)], *n));
        gauges(&mut to, "fairlead_devices", "Devices, by role and by whether the programs are attached", devices)?;
        let conflicts = to.encode_descriptor(
            "fairlead_device_conflicts",
            "Foreign programs before Fairlead's at ingress, or behind it at egress",
            None,
            MetricType::Gauge,
        )?;
        ConstGauge::new(numbers.devices.conflicts).encode(conflicts)?;
        gauges(
            &mut to,
            "fairlead_build_info",
            "Always 1; its label says which version runs",
            [([("version", env!("CARGO_PKG_VERSION"))], 1)],
        )
    }
}

fn control_plane(to: &mut DescriptorEncoder<'_>, figures: &Figures) -> fmt::Result {
    let changes = [([("result", "done")], figures.changes_done), ([("result", "failed")], figures.changes_failed)];
    counters(to, "fairlead_sync_changes", "Changes of one Service or of the node's addresses", changes)?;
    for (name, what, seen, pending) in [
        ("kubeproxy_sync_proxy_rules_service_changes", "Services", figures.seen.services, figures.pending.services),
        ("kubeproxy_sync_proxy_rules_endpoint_changes", "EndpointSlices", figures.seen.slices, figures.pending.slices),
    ] {
        let help = format!("Changes of {what} that the source has told of");
        let counter = to.encode_descriptor(name, &help, None, MetricType::Counter)?;
        ConstCounter::new(seen).encode(counter)?;
        let (name, help) = (format!("{name}_pending"), format!("Those of {what} that the maps do not have yet"));
        let gauge = to.encode_descriptor(&name, &help, None, MetricType::Gauge)?;
        ConstGauge::new(pending).encode(gauge)?;
    }
    let writes = to.encode_descriptor("fairlead_sync_writes", "Writes to maps", None, MetricType::Counter)?;
    ConstCounter::new(figures.writes).encode(writes)?;
    let services = [
        ([("state", "served")], figures.served as u64),
        ([("state", "partly_served")], figures.partly_served as u64),
        ([("state", "failed")], figures.failed as u64),
    ];
    gauges(to, "fairlead_services", "Services by how they stand", services)?;
    let [services, slices] = figures.objects.map(|n| n as u64);
    let objects = [([("kind", "Service")], services), ([("kind", "EndpointSlice")], slices)];
    gauges(to, "fairlead_objects", "Objects that the source has told of", objects)
}

fn counters<const N: usize>(
    to: &mut DescriptorEncoder<'_>,
    name: &str,
    help: &str,
    values: impl IntoIterator<Item = ([(&'static str, &'static str); N], u64)>,
) -> fmt::Result {
    let mut metric = to.encode_descriptor(name, help, None, MetricType::Counter)?;
    for (labels, value) in values {
        ConstCounter::new(value).encode(metric.encode_family(&labels)?)?;
    }
    Ok(())
}

fn gauges<const N: usize>(
    to: &mut DescriptorEncoder<'_>,
    name: &str,
    help: &str,
    values: impl IntoIterator<Item = ([(&'static str, &'static str); N], u64)>,
) -> fmt::Result {
    let mut metric = to.encode_descriptor(name, help, None, MetricType::Gauge)?;
    for (labels, value) in values {
        ConstGauge::new(value).encode(metric.encode_family(&labels)?)?;
    }
    Ok(())
}
