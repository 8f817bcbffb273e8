//! The processor's time: when the machine ran nobody, and how a case that measures gets its turn before others.
//!
//! A virtual machine that is put to sleep for half a second, or one that compiles something, makes every answer late.
//! That is no error of what is tested, and must not look like one.

use std::{
    collections::VecDeque,
    sync::{Mutex, Once, PoisonError},
    time::{Duration, Instant},
};

/// How often the watch looks at the clock.
const TICK: Duration = Duration::from_millis(2);
/// What a wake-up may be late on a machine that runs.
const USUAL: Duration = Duration::from_millis(1);
/// Pauses that are remembered.
const KEPT: usize = 10_000;
/// Before everything else that is scheduled fairly.
const FIRST: libc::c_int = -20;

static SEEN: Mutex<Seen> = Mutex::new(Seen { looked: None, pauses: VecDeque::new() });

struct Seen {
    /// The last look at the clock.
    looked: Option<Instant>,
    pauses: VecDeque<(Instant, Instant)>,
}

/// Begins to watch for pauses, once in a process. A pause before the first call is not seen.
pub fn watch() {
    static ONCE: Once = Once::new();
    ONCE.call_once(|| {
        let spawned = std::thread::Builder::new().name("pauses".to_owned()).spawn(|| {
            set_nice(FIRST);
            loop {
                let before = Instant::now();
                std::thread::sleep(TICK);
                let now = Instant::now();
                let mut seen = SEEN.lock().unwrap_or_else(PoisonError::into_inner);
                seen.looked = Some(now);
                if now - before > TICK + USUAL {
                    seen.pauses.push_back((before + TICK, now));
                    if seen.pauses.len() > KEPT {
                        seen.pauses.pop_front();
                    }
                }
            }
        });
        // Without a thread no pause is known, and tests are as strict as on a machine that never pauses.
        if let Err(error) = spawned {
            eprintln!("nobody watches for pauses of the machine: {error}");
        }
    });
}

/// The longest pause of the machine that overlaps this span.
pub fn longest_pause(from: Instant, to: Instant) -> Duration {
    // A pause that has only just ended is not noted yet.
    for _ in 0..50 {
        match SEEN.lock().unwrap_or_else(PoisonError::into_inner).looked {
            Some(looked) if looked < to => {}
            _ => break,
        }
        std::thread::sleep(TICK);
    }
    let seen = SEEN.lock().unwrap_or_else(PoisonError::into_inner);
    let overlapping = seen.pauses.iter().filter(|(began, ended)| *began <= to && *ended >= from);
    overlapping.map(|(began, ended)| *ended - *began).max().unwrap_or_default()
}

/// While it lives the calling thread, and all that it starts, goes before other work of the machine.
#[derive(Debug)]
pub struct Preferred(libc::c_int);

impl Preferred {
    /// Best effort: without the right to it, everything stays as it is.
    pub fn new() -> Self {
        // SAFETY: plain integers; the calling thread is meant.
        let before = unsafe { libc::getpriority(libc::PRIO_PROCESS, 0) };
        set_nice(FIRST);
        Self(before)
    }
}

impl Default for Preferred {
    fn default() -> Self {
        Self::new()
    }
}

impl Drop for Preferred {
    fn drop(&mut self) {
        set_nice(self.0);
    }
}

/// From now on the calling thread goes before everything that is not the kernel's: for one that is part of the network, whose
/// delays would look like losses. Best effort, too.
pub fn go_first() {
    set_nice(FIRST);
    let lowest = libc::sched_param { sched_priority: 1 };
    // SAFETY: a live struct; the calling thread is meant.
    unsafe { libc::sched_setscheduler(0, libc::SCHED_FIFO, &raw const lowest) };
}

fn set_nice(nice: libc::c_int) {
    // SAFETY: plain integers; the calling thread is meant, not its process.
    unsafe { libc::setpriority(libc::PRIO_PROCESS, 0, nice) };
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_machine_that_runs_has_no_long_pause_and_one_that_slept_has() {
        watch();
        let began = Instant::now();
        std::thread::sleep(Duration::from_millis(20));
        assert!(longest_pause(began, Instant::now()) < Duration::from_secs(5));
        let (slept, woke) = (began + Duration::from_secs(3600), began + Duration::from_secs(3601));
        SEEN.lock().unwrap().pauses.push_back((slept, woke));
        let middle = slept + Duration::from_millis(500);
        SEEN.lock().unwrap().looked = None;
        assert_eq!(longest_pause(middle, middle), Duration::from_secs(1));
        assert_eq!(longest_pause(woke + Duration::from_millis(1), woke + TICK), Duration::ZERO);
    }
}
