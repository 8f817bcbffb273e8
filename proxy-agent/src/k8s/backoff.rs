//! How long an attempt waits after one that failed: little at first, never long, and not as long as other nodes wait.
//!
//! kube-rs' own pauses grow to half a minute and more, and a proxy that waits so long for a server that is back serves
//! endpoints that are gone.

use std::time::Duration;

/// The longest that the first pause may be. It doubles with each failure.
const FIRST: Duration = Duration::from_millis(400);
/// Nobody answers: attempts cost no server anything, and the one that comes back is wanted soon.
pub(super) const UNREACHABLE: Duration = Duration::from_secs(2);
/// Somebody answers, with an error: what comes too often may be the reason.
pub(super) const REFUSED: Duration = Duration::from_secs(5);
/// Something is asked for that this server may never have.
pub(super) const ABSENT: Duration = Duration::from_secs(300);

/// Failures in a row.
#[derive(Debug, Default)]
pub(super) struct Backoff(u32);

impl Backoff {
    /// The pause after one more failure, of at most `longest`. All nodes lose a server in the same moment: `chance`
    /// spreads them over three quarters of the pause.
    pub(super) fn next(&mut self, longest: Duration, chance: u64) -> Duration {
        let step = FIRST.saturating_mul(1 << self.0.min(16)).min(longest);
        self.0 += 1;
        step.mul_f64(0.25 + 0.75 * (chance as f64 / u64::MAX as f64))
    }

    /// It worked.
    pub(super) fn reset(&mut self) {
        self.0 = 0;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn pauses(longest: Duration, chance: u64) -> Vec<u128> {
        let mut backoff = Backoff::default();
        (0..6).map(|_| backoff.next(longest, chance).as_millis()).collect()
    }

    #[test]
    fn pauses_double_up_to_the_longest() {
        assert_eq!(pauses(UNREACHABLE, u64::MAX), [400, 800, 1600, 2000, 2000, 2000]);
        assert_eq!(pauses(REFUSED, u64::MAX), [400, 800, 1600, 3200, 5000, 5000]);
        assert_eq!(pauses(UNREACHABLE, 0), [100, 200, 400, 500, 500, 500]);
        let mut backoff = Backoff::default();
        for _ in 0..100 {
            assert!(backoff.next(ABSENT, u64::MAX) <= ABSENT);
        }
        backoff.reset();
        assert_eq!(backoff.next(REFUSED, u64::MAX), FIRST);
    }

    #[test]
    fn five_thousand_nodes_that_lose_a_server_at_once_do_not_come_back_at_once() {
        let mut at = vec![Duration::ZERO; 5_000];
        let mut backoffs: Vec<_> = at.iter().map(|_| Backoff::default()).collect();
        for round in 0..4 {
            for (at, backoff) in at.iter_mut().zip(&mut backoffs) {
                *at += backoff.next(UNREACHABLE, crate::dataplane::sys::random_u64().unwrap());
            }
            let mut sorted = at.clone();
            sorted.sort();
            // Attempts of all nodes within any 10 ms, as a share: an even spread of the first round is 1 in 30.
            let busiest = sorted
                .iter()
                .enumerate()
                .map(|(i, from)| sorted[i..].partition_point(|at| *at < *from + Duration::from_millis(10)))
                .max()
                .unwrap();
            assert!(busiest < 5_000 / 15, "round {round}: {busiest} nodes within 10 ms");
        }
    }
}
