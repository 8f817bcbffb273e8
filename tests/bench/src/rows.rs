//! The rows of the table of ratios.

use std::{
    fmt,
    net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr},
    time::Duration,
};

use anyhow::{Context as _, Result, ensure};
use fairlead_tests::counters::Counters;
use proxy_common::Outcome;
use serde::Serialize;

use crate::{
    classes::LASTING,
    path::Path,
    plane::Plane,
    sender::{Sender, Slice},
    services::{self, PORT},
    stats::{self, Ratio},
};

/// What is sent.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, clap::ValueEnum)]
#[serde(rename_all = "snake_case")]
pub enum Traffic {
    /// UDP, one way, of a flow that was answered once.
    Established,
    /// UDP, one way, each packet a flow of its own.
    NewFlow,
    /// The first to a NodePort, whose source is exchanged as well.
    Masqueraded,
    /// The second to a NodePort.
    NewMasqueraded,
    /// UDP to a pod that is no endpoint of any Service.
    Other,
    /// UDP to an endpoint's own address, past every Service.
    Direct,
}

impl Traffic {
    /// All of them.
    pub const ALL: [Self; 6] =
        [Self::Established, Self::NewFlow, Self::Masqueraded, Self::NewMasqueraded, Self::Other, Self::Direct];

    /// In words.
    pub const fn describe(self) -> &'static str {
        match self {
            Self::Established => "established UDP flow",
            Self::NewFlow => "every packet a new flow",
            Self::Masqueraded => "established, masqueraded",
            Self::NewMasqueraded => "new flows, masqueraded",
            Self::Other => "no Service's traffic",
            Self::Direct => "endpoint's own address",
        }
    }

    /// The bound of loaded ÷ not loaded.
    pub const fn bound(self) -> Option<f64> {
        match self {
            Self::Established => Some(1.10),
            Self::NewFlow => Some(1.6),
            Self::Masqueraded => Some(1.15),
            Self::NewMasqueraded => Some(2.5),
            Self::Other => Some(1.05),
            Self::Direct => None,
        }
    }

    /// What the programs must say of each packet, where it arrives and where it leaves.
    const fn outcomes(self) -> &'static [&'static [Outcome]] {
        const NEW: &[Outcome] = &[Outcome::RequestNew, Outcome::RequestHalfOpen];
        match self {
            Self::Established => &[&[Outcome::Request]],
            Self::NewFlow => &[NEW],
            Self::Masqueraded => &[&[Outcome::Request], &[Outcome::Masqueraded]],
            Self::NewMasqueraded => &[NEW, &[Outcome::Masqueraded]],
            Self::Other | Self::Direct => &[],
        }
    }

    /// Where it is sent to, if it is a Service's.
    fn service(self, path: &Path, v6: bool) -> SocketAddr {
        match self {
            Self::Masqueraded | Self::NewMasqueraded => SocketAddr::new(path.lab.node.ip(v6), services::MASQUERADED),
            _ => SocketAddr::new(services::vip(v6), PORT),
        }
    }
}

/// The bound of many ÷ few Services.
pub const MANY_BOUND: f64 = 1.10;

/// How to measure.
#[derive(Clone, Copy, Debug)]
pub struct Effort {
    /// Interleaved rounds; each yields one pair.
    pub rounds: usize,
    /// Length of one slice.
    pub slice: Duration,
    /// Services of the second loaded state.
    pub many: u32,
}

/// A row.
#[derive(Clone, Debug, Serialize)]
pub struct Row {
    /// What was sent.
    pub traffic: Traffic,
    /// Over IPv6.
    pub v6: bool,
    /// Nanoseconds per packet without programs, the median of the rounds.
    pub bare_ns: f64,
    /// The same with few Services.
    pub few_ns: f64,
    /// The same with many Services.
    pub many_ns: f64,
    /// Few Services ÷ no programs.
    pub few: Ratio,
    /// Many Services ÷ no programs.
    pub many: Ratio,
    /// Many Services ÷ few Services.
    pub growth: Ratio,
}

impl Row {
    /// Its name, as `--check` prints it.
    pub fn name(&self) -> String {
        format!("{}, IPv{}", self.traffic.describe(), if self.v6 { 6 } else { 4 })
    }

    /// The bounds that it misses, in words.
    pub fn misses(&self) -> Vec<String> {
        let mut missed = Vec::new();
        if let Some(bound) = self.traffic.bound() {
            for (what, ratio) in [("few Services", self.few), ("many Services", self.many)] {
                if ratio.misses(bound) {
                    missed.push(format!("{}: {what} ÷ no programs is {ratio}, the bound is {bound}", self.name()));
                }
            }
            if self.growth.misses(MANY_BOUND) {
                missed.push(format!(
                    "{}: many ÷ few Services is {}, the bound is {MANY_BOUND}",
                    self.name(),
                    self.growth
                ));
            }
        }
        missed
    }
}

impl fmt::Display for Row {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(
            f,
            "{:<32} {:>6.0} {:>6.0} {:>6.0}  {}  {}  {}",
            self.name(),
            self.bare_ns,
            self.few_ns,
            self.many_ns,
            self.few,
            self.many,
            self.growth
        )
    }
}

/// The states between which the rounds alternate.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum State {
    Bare,
    Few,
    Many,
}

impl State {
    /// Each comes first, second and last equally often, and each follows each.
    const ORDERS: [[Self; 3]; 6] = [
        [Self::Bare, Self::Few, Self::Many],
        [Self::Few, Self::Many, Self::Bare],
        [Self::Many, Self::Bare, Self::Few],
        [Self::Many, Self::Few, Self::Bare],
        [Self::Bare, Self::Many, Self::Few],
        [Self::Few, Self::Bare, Self::Many],
    ];
}

/// The path with two sets of programs that can be put into it.
#[derive(Debug)]
pub struct Bench {
    path: Path,
    few: Plane,
    many: Plane,
    effort: Effort,
    state: State,
}

impl Bench {
    /// Builds the path, loads and fills both sets.
    pub fn new(object: &[u8], effort: Effort) -> Result<Self> {
        let path = Path::new()?;
        let devices = path.devices()?;
        let pins = |name: &str| path.lab.pin_path().with_file_name(format!("{}-{name}", path.lab.id));
        let few = Plane::new(object, &path.lab.node.ns, &devices, pins("few"), &path.plan(3))?;
        let many = Plane::new(object, &path.lab.node.ns, &devices, pins("many"), &path.plan(effort.many))?;
        Ok(Self { path, few, many, effort, state: State::Bare })
    }

    fn enter(&mut self, state: State) -> Result<()> {
        if self.state == state {
            return Ok(());
        }
        self.few.detach()?;
        self.many.detach()?;
        match state {
            State::Bare => {}
            State::Few => self.few.attach()?,
            State::Many => self.many.attach()?,
        }
        self.state = state;
        Ok(())
    }

    /// The counters of the programs that stand in the path.
    const fn counters(&self) -> Option<&Counters> {
        match self.state {
            State::Bare => None,
            State::Few => Some(self.few.counters()),
            State::Many => Some(self.many.counters()),
        }
    }

    /// Measures one row.
    pub fn row(&mut self, traffic: Traffic, v6: bool) -> Result<Row> {
        let mut senders = self.senders(traffic, v6)?;
        let (mut bare, mut few, mut many) = (Vec::new(), Vec::new(), Vec::new());
        for round in 0..=self.effort.rounds {
            let mut figures = [0.0; 3];
            for state in State::ORDERS[round % State::ORDERS.len()] {
                self.enter(state)?;
                let sender = &mut senders[state as usize];
                // What the caches and the tables hold of the state before goes first.
                sender.slice(self.effort.slice / 5)?;
                figures[state as usize] = self.counted(sender, traffic)?.ns;
            }
            // The first round warms up.
            if round != 0 {
                bare.push(figures[0]);
                few.push(figures[1]);
                many.push(figures[2]);
            }
        }
        self.enter(State::Bare)?;
        let ratio = |above: &[f64], below: &[f64]| {
            let pairs: Vec<_> = above.iter().copied().zip(below.iter().copied()).collect();
            Ratio::of(&pairs).context("no rounds")
        };
        let median = |values: &[f64]| stats::median(values).context("no rounds");
        Ok(Row {
            traffic,
            v6,
            bare_ns: median(&bare)?,
            few_ns: median(&few)?,
            many_ns: median(&many)?,
            few: ratio(&few, &bare)?,
            many: ratio(&many, &bare)?,
            growth: ratio(&many, &few)?,
        })
    }

    /// A slice whose packets all arrived, and all of which the programs judged as they should.
    fn counted(&self, sender: &mut Sender, traffic: Traffic) -> Result<Slice> {
        let received = self.path.received()?;
        let before = self.counters().map(Counters::read).transpose()?;
        let slice = sender.slice(self.effort.slice)?;
        let arrived = self.path.received()? - received;
        ensure!(
            arrived >= slice.sent - slice.sent / 1_000,
            "{traffic:?} {:?}: of {} packets only {arrived} arrived",
            self.state,
            slice.sent
        );
        let (Some(counters), Some(before)) = (self.counters(), before) else { return Ok(slice) };
        let judged = counters.since(&before)?;
        let count = |outcomes: &[Outcome]| outcomes.iter().filter_map(|outcome| judged.get(outcome)).sum::<u64>();
        let expected: Vec<_> = traffic.outcomes().iter().map(|outcomes| count(outcomes)).collect();
        let other = judged.values().sum::<u64>() - expected.iter().sum::<u64>();
        ensure!(
            expected.iter().all(|count| *count == slice.sent) && other <= slice.sent / 1_000,
            "{traffic:?} {:?}: the programs judged {} packets as {judged:?}",
            self.state,
            slice.sent
        );
        Ok(slice)
    }

    /// Senders for the three states.
    fn senders(&mut self, traffic: Traffic, v6: bool) -> Result<[Sender; 3]> {
        let vip = traffic.service(&self.path, v6);
        let targets = self.path.targets(v6);
        let first = *targets.first().context("no endpoint")?;
        match traffic {
            Traffic::Established | Traffic::Masqueraded => {
                self.enter(State::Bare)?;
                let bare = self.established(first)?;
                self.enter(State::Few)?;
                let few = self.lasting(vip)?;
                self.enter(State::Many)?;
                Ok([bare, few, self.lasting(vip)?])
            }
            Traffic::NewFlow | Traffic::NewMasqueraded => {
                // The neighbours' MACs are found out beforehand: each packet of the slices is to be forwarded at once.
                self.enter(State::Bare)?;
                for target in &targets {
                    self.established(*target)?;
                }
                Ok([self.new_flows(&targets)?, self.new_flows(&[vip])?, self.new_flows(&[vip])?])
            }
            Traffic::Other => {
                let other = SocketAddr::new(self.path.other(v6), services::TARGET);
                Ok([self.established(other)?, self.established(other)?, self.established(other)?])
            }
            Traffic::Direct => Ok([self.established(first)?, self.established(first)?, self.established(first)?]),
        }
    }

    fn established(&self, to: SocketAddr) -> Result<Sender> {
        let socket = self.path.connect(to)?;
        self.path.confirm(&socket)?;
        Ok(Sender::connected(socket))
    }

    /// A flow that has lasted, and was answered since: it is confirmed.
    fn lasting(&self, to: SocketAddr) -> Result<Sender> {
        let socket = self.path.connect(to)?;
        self.path.confirm(&socket)?;
        std::thread::sleep(LASTING);
        self.path.confirm(&socket)?;
        Ok(Sender::connected(socket))
    }

    fn new_flows(&self, to: &[SocketAddr]) -> Result<Sender> {
        let v6 = to.first().is_some_and(SocketAddr::is_ipv6);
        let source: IpAddr = if v6 {
            Ipv6Addr::new(0xfd00, 0x250, 0, 0, 0, 0, 0, 0).into()
        } else {
            Ipv4Addr::new(10, 250, 0, 0).into()
        };
        self.path.client().ns.run(|| Sender::new_flows(source, to))?.context("cannot open a raw socket")
    }
}
