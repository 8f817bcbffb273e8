//! A cluster of thousands of Services behind a real API server: how fast a change is served, how fast a start, and what
//! both take.
//!
//! In each round every proxy starts on an empty node, serves all Services, follows changes and goes again without a
//! trace, by turns and never at the same time: on a small machine one would measure the other.

use std::{
    fmt,
    time::{Duration, Instant},
};

use anyhow::{Context as _, Result, ensure};
use fairlead_lab::schedule::{self, Preferred};
use serde::Serialize;

mod answers;
mod cluster;
mod probe;
mod proxy;
mod usage;

use cluster::{Cluster, ENDPOINTS};
pub use proxy::Proxy;
use proxy::Running;
pub use usage::Memory;

/// Services of the small cluster whose idle memory is looked at.
const FEW: u32 = 100;
/// How long a proxy may take to serve everything, and to serve a change.
const STARTED: Duration = Duration::from_secs(120);
const SERVED: Duration = Duration::from_secs(60);
/// After this much silence a proxy is idle.
const SETTLED: Duration = Duration::from_secs(3);
/// A pause of the machine that spoils a change; it is measured again.
const STALL: Duration = Duration::from_millis(8);
/// Time between two changes.
const PAUSE: Duration = Duration::from_millis(20);
/// Two changes that follow each other are of Services far apart.
const STRIDE: u32 = 7_919;

/// Bounds of Fairlead at 5,000 Services.
const MEDIAN: Duration = Duration::from_millis(5);
const P99: Duration = Duration::from_millis(20);
const COLD: Duration = Duration::from_millis(1_500);
const RESIDENT: u64 = 60_000_000;
/// The same, idle at a hundred.
const RESIDENT_FEW: u64 = 25_000_000;

/// What to do.
#[derive(Clone, Copy, Debug)]
pub struct Plan {
    /// Services.
    pub services: u32,
    /// Rounds.
    pub rounds: u32,
    /// Changes that Fairlead follows, in all rounds together.
    pub changes: u32,
    /// Those that kube-proxy follows, which takes a second or more for each. 0 leaves it out.
    pub kube_proxy: u32,
}

/// What one proxy did.
#[derive(Clone, Debug, Serialize)]
pub struct Figures {
    proxy: Proxy,
    /// From its execution to the first answer of the Service that was served last; one for each round.
    cold_ms: Vec<f64>,
    /// Processor time of such a start.
    cold_cpu_s: Vec<f64>,
    /// From the API server's answer to a write to the first answer of the new pod.
    changes_ms: Vec<f64>,
    /// Processor time of all changes.
    changes_cpu_s: f64,
    /// Changes that were measured again, because the machine paused.
    spoilt: u32,
    /// Questions after the new pod's first answer that it did not answer.
    late: u32,
    /// Idle after the start; one for each round.
    idle: Vec<Memory>,
    /// After the changes.
    after: Vec<Memory>,
    /// What the kernel holds for its maps, bytes.
    maps: Option<u64>,
}

/// Everything.
#[derive(Clone, Debug, Serialize)]
pub struct Seen {
    services: u32,
    endpoints: u32,
    /// Fairlead, idle at a hundred Services.
    few: Memory,
    proxies: Vec<Figures>,
}

/// Measures in a cluster of its own.
pub fn run(plan: Plan) -> Result<Seen> {
    // Everything that takes part goes before other work of the machine.
    let _first = Preferred::new();
    let mut cluster = Cluster::start()?;
    cluster.grow(FEW.min(plan.services))?;
    let few = idle_with_few(&cluster)?;
    let began = Instant::now();
    cluster.grow(plan.services)?;
    eprintln!("scale: {} Services and slices written within {:.1?}", plan.services, began.elapsed());
    let mut proxies = vec![(Figures::new(Proxy::Fairlead), plan.changes)];
    if plan.kube_proxy > 0 {
        proxies.push((Figures::new(Proxy::KubeProxy), plan.kube_proxy));
    }
    let mut next = 0;
    for round in 0..plan.rounds {
        for (figures, changes) in &mut proxies {
            let share = *changes / plan.rounds + u32::from(round < *changes % plan.rounds);
            figures.round(&mut cluster, share, &mut next).with_context(|| format!("round {round}"))?;
        }
    }
    let proxies = proxies.into_iter().map(|(figures, _)| figures).collect();
    Ok(Seen { services: plan.services, endpoints: ENDPOINTS, few, proxies })
}

fn idle_with_few(cluster: &Cluster) -> Result<Memory> {
    let mut running = Running::start(Proxy::Fairlead, cluster)?;
    served(cluster, &mut running)?;
    std::thread::sleep(SETTLED);
    let memory = usage::memory(running.pid())?;
    running.end(cluster)?;
    Ok(memory)
}

/// Waits until everything is served, and says how long that took.
fn served(cluster: &Cluster, running: &mut Running) -> Result<Duration> {
    match cluster.last_served(STARTED, || running.is_alive()) {
        Ok(last) => Ok(last - running.since),
        Err(error) => Err(error.context(format!("its log ends with:\n{}", running.log_tail()))),
    }
}

impl Figures {
    const fn new(proxy: Proxy) -> Self {
        Self {
            proxy,
            cold_ms: Vec::new(),
            cold_cpu_s: Vec::new(),
            changes_ms: Vec::new(),
            changes_cpu_s: 0.0,
            spoilt: 0,
            late: 0,
            idle: Vec::new(),
            after: Vec::new(),
            maps: None,
        }
    }

    /// A start, changes, and the end. `next` counts the changes of all.
    fn round(&mut self, cluster: &mut Cluster, changes: u32, next: &mut u32) -> Result<()> {
        let mut running = Running::start(self.proxy, cluster)?;
        let cold = served(cluster, &mut running)?;
        std::thread::sleep(SETTLED);
        let spent = usage::processor(running.pid())?;
        self.cold_ms.push(ms(cold));
        self.cold_cpu_s.push(spent.as_secs_f64());
        self.idle.push(usage::memory(running.pid())?);
        let followed = self.follow(cluster, changes, next);
        followed.with_context(|| format!("the log of {} ends with:\n{}", self.proxy, running.log_tail()))?;
        self.changes_cpu_s += (usage::processor(running.pid())? - spent).as_secs_f64();
        self.after.push(usage::memory(running.pid())?);
        if self.proxy == Proxy::Fairlead {
            self.maps = Some(usage::maps(&cluster.lab.pin_path())?);
        }
        eprintln!("scale: {}: {:.0} ms to the last Service, {changes} changes", self.proxy, ms(cold));
        running.end(cluster)
    }

    fn follow(&mut self, cluster: &mut Cluster, changes: u32, next: &mut u32) -> Result<()> {
        let (mut measured, mut spoilt) = (0, 0);
        while measured < changes {
            std::thread::sleep(PAUSE);
            *next += 1;
            let n = (u64::from(*next) * u64::from(STRIDE) % u64::from(cluster.services())) as u32;
            let effect = cluster.change(n, SERVED)?;
            self.late += effect.late;
            if schedule::longest_pause(effect.span.0, effect.span.1) > STALL.max(effect.took / 10) {
                spoilt += 1;
                ensure!(spoilt <= changes, "the machine is too busy to measure: it paused in {spoilt} changes");
                continue;
            }
            measured += 1;
            self.changes_ms.push(ms(effect.took));
        }
        self.spoilt += spoilt;
        Ok(())
    }

    fn resident(&self) -> u64 {
        self.idle.iter().chain(&self.after).map(|memory| memory.resident).max().unwrap_or(0)
    }

    fn peak(&self) -> u64 {
        self.after.iter().map(|memory| memory.peak).max().unwrap_or(0)
    }
}

impl Seen {
    /// The bounds that are missed.
    pub fn misses(&self) -> Vec<String> {
        let mut misses = Vec::new();
        let mut judge = |what: &str, value: f64, bound: f64, unit: &str| {
            // What is no number keeps no bound.
            if value.is_nan() || value > bound {
                misses.push(format!("{what}: {value:.1} {unit}, at most {bound:.1}"));
            }
        };
        let mb = |bytes: u64| bytes as f64 / 1e6;
        judge(&format!("resident at {FEW} Services"), mb(self.few.resident), mb(RESIDENT_FEW), "MB");
        for figures in self.proxies.iter().filter(|figures| figures.proxy == Proxy::Fairlead) {
            judge("write to served, median", percentile(&figures.changes_ms, 50), ms(MEDIAN), "ms");
            judge("write to served, p99", percentile(&figures.changes_ms, 99), ms(P99), "ms");
            judge("cold start", percentile(&figures.cold_ms, 50), ms(COLD), "ms");
            judge("resident", mb(figures.resident()), mb(RESIDENT), "MB");
            judge("later questions not answered by the new pod", figures.late.into(), 0.0, "");
        }
        misses
    }
}

fn ms(duration: Duration) -> f64 {
    duration.as_secs_f64() * 1e3
}

/// By rank; not a number of nothing.
fn percentile(values: &[f64], percent: usize) -> f64 {
    let mut sorted = values.to_vec();
    sorted.sort_by(f64::total_cmp);
    let rank = (sorted.len() * percent).div_ceil(100).max(1);
    sorted.get(rank - 1).copied().unwrap_or(f64::NAN)
}

impl fmt::Display for Seen {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let mb = |bytes: u64| bytes as f64 / 1e6;
        let mut line = |name: &str, of: &dyn Fn(&Figures) -> String| {
            write!(f, "{name:<44}")?;
            self.proxies.iter().try_for_each(|figures| write!(f, " {:>26}", of(figures)))?;
            writeln!(f)
        };
        line(&format!("{} Services × {} endpoints", self.services, self.endpoints), &|p| p.proxy.to_string())?;
        line("write → served, p50 / p99 / worst, ms", &|p| {
            let at = |percent| percentile(&p.changes_ms, percent);
            format!("{:.1} / {:.1} / {:.1}", at(50), at(99), at(100))
        })?;
        line("  changes (measured again)", &|p| format!("{} ({})", p.changes_ms.len(), p.spoilt))?;
        line("  later questions not answered by the new pod", &|p| p.late.to_string())?;
        line("  processor time of a change, ms", &|p| {
            format!("{:.1}", p.changes_cpu_s * 1e3 / (p.changes_ms.len() as f64 + f64::from(p.spoilt)))
        })?;
        line("exec → last Service served, median / worst, s", &|p| {
            format!("{:.2} / {:.2}", percentile(&p.cold_ms, 50) / 1e3, percentile(&p.cold_ms, 100) / 1e3)
        })?;
        line("  processor time of a start, s", &|p| format!("{:.2}", percentile(&p.cold_cpu_s, 50)))?;
        line("resident, idle / after changes / peak, MB", &|p| {
            let of = |memory: &[Memory]| memory.iter().map(|m| m.resident).max().unwrap_or(0);
            format!("{:.1} / {:.1} / {:.1}", mb(of(&p.idle)), mb(of(&p.after)), mb(p.peak()))
        })?;
        line("maps in the kernel, MB", &|p| p.maps.map_or("-".to_owned(), |bytes| format!("{:.0}", mb(bytes))))?;
        write!(
            f,
            "fairlead idle at {FEW} Services: resident {:.1} MB, peak {:.1} MB",
            mb(self.few.resident),
            mb(self.few.peak)
        )
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn seen(changes: &[f64], cold: f64, resident: u64, late: u32) -> Seen {
        let memory = Memory { resident, peak: resident };
        let figures = Figures {
            cold_ms: vec![cold],
            changes_ms: changes.to_vec(),
            late,
            idle: vec![memory],
            after: vec![memory],
            ..Figures::new(Proxy::Fairlead)
        };
        let few = Memory { resident: 20_000_000, peak: 20_000_000 };
        Seen { services: 5_000, endpoints: 10, few, proxies: vec![figures] }
    }

    #[test]
    fn percentiles_are_by_rank() {
        let hundred: Vec<_> = (1..=100).map(f64::from).collect();
        assert_eq!([50, 99, 100].map(|p| percentile(&hundred, p)), [50.0, 99.0, 100.0]);
        assert_eq!(percentile(&[7.0], 1), 7.0);
        assert!(percentile(&[], 50).is_nan());
    }

    #[test]
    fn every_bound_is_judged() {
        assert_eq!(seen(&[4.0; 100], 1_400.0, 50_000_000, 0).misses(), Vec::<String>::new());
        let missed = seen(&[30.0; 100], 1_600.0, 70_000_000, 1).misses();
        assert_eq!(missed.len(), 5, "{missed:?}");
        let slow_tail: Vec<_> = (0..100).map(|n| if n < 98 { 1.0 } else { 25.0 }).collect();
        assert_eq!(seen(&slow_tail, 1.0, 1, 0).misses(), ["write to served, p99: 25.0 ms, at most 20.0"]);
        assert_eq!(seen(&[], 1.0, 1, 0).misses().len(), 2, "nothing measured keeps no bound");
    }
}
