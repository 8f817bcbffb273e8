//! The programs of devices without an Ethernet header: loaded when the first such device comes, and tried again where that
//! fails.

use std::time::{Duration, Instant};

use super::{Common, FLAT, FLAT_OBJECT, LoadError, Stubs, create_maps, load_programs, stubs, switch};

/// Pauses between attempts: the first one, and the longest.
const PAUSES: [Duration; 2] = [Duration::from_secs(5), Duration::from_secs(300)];

/// Their stubs, once they are needed.
#[derive(Debug, Default)]
pub(super) struct Flat {
    stubs: Option<Stubs>,
    attempts: Attempts,
}

impl Flat {
    /// The stubs, loaded if that was not tried a short time ago.
    pub(super) fn stubs(&mut self, common: &Common) -> Result<&mut Stubs, LoadError> {
        let stubs = match self.stubs.take() {
            Some(stubs) => stubs,
            None if self.attempts.due(Instant::now()) => load(common).map_err(|error| {
                let why = error.to_string();
                if self.attempts.failed(Instant::now(), &why) {
                    tracing::error!(
                        error = why,
                        "the programs for devices without an Ethernet header do not load; they are tried again, at least every \
                         five minutes"
                    );
                }
                LoadError::Flat
            })?,
            None => return Err(LoadError::Flat),
        };
        Ok(self.stubs.insert(stubs))
    }
}

fn load(common: &Common) -> Result<Stubs, LoadError> {
    let began = Instant::now();
    let mut ebpf = create_maps(FLAT_OBJECT, common)?;
    load_programs(&mut ebpf)?;
    switch(&mut ebpf, &FLAT, &common.pins)?;
    let took_ms = began.elapsed().as_millis() as u64;
    tracing::info!(took_ms, "programs loaded for devices without an Ethernet header");
    stubs(&FLAT, &common.pins)
}

/// Attempts that failed.
#[derive(Debug, Default)]
struct Attempts {
    why: String,
    pause: Duration,
    next: Option<Instant>,
}

impl Attempts {
    fn due(&self, now: Instant) -> bool {
        self.next.is_none_or(|next| now >= next)
    }

    /// Notes a failure; true if its reason is another one than before.
    fn failed(&mut self, now: Instant, why: &str) -> bool {
        let [first, longest] = PAUSES;
        self.pause = (self.pause * 2).clamp(first, longest);
        self.next = Some(now + self.pause);
        let news = self.why != why;
        why.clone_into(&mut self.why);
        news
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn attempts_become_rare_and_a_reason_is_told_once() {
        let (mut attempts, mut now) = (Attempts::default(), Instant::now());
        assert!(attempts.due(now));
        let mut pauses = Vec::new();
        for n in 0..9 {
            assert_eq!(attempts.failed(now, if n < 5 { "full" } else { "refused" }), n == 0 || n == 5, "attempt {n}");
            let pause = attempts.next.unwrap() - now;
            assert!(!attempts.due(now + pause - Duration::from_millis(1)) && attempts.due(now + pause));
            pauses.push(pause.as_secs());
            now += pause;
        }
        assert_eq!(pauses, [5, 10, 20, 40, 80, 160, 300, 300, 300]);
    }
}
