//! Attempts that fail and are costly: each pause is twice as long as the one before it.

use std::time::{Duration, Instant};

/// Pauses between attempts: the first one, and the longest.
const PAUSES: [Duration; 2] = [Duration::from_secs(5), Duration::from_secs(300)];

/// Attempts that failed.
#[derive(Debug, Default)]
pub(crate) struct Attempts {
    why: String,
    pause: Duration,
    next: Option<Instant>,
}

impl Attempts {
    pub(crate) fn due(&self, now: Instant) -> bool {
        self.next.is_none_or(|next| now >= next)
    }

    /// Notes a failure; true if its reason is another one than before.
    pub(crate) fn failed(&mut self, now: Instant, why: &str) -> bool {
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
