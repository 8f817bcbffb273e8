//! `--devices`: which devices are served, and roles that override what was found.

use proxy_common::abi::Role;

use crate::config::Invalid;

/// A role that a person may give a device; `None` is "leave it alone".
pub type GivenRole = Option<Role>;

/// Names of the roles, as flags and output write them.
pub const ROLES: [(&str, GivenRole); 6] = [
    ("uplink", Some(Role::Uplink)),
    ("pod", Some(Role::Pod)),
    ("bridge-port", Some(Role::BridgePort)),
    ("bridge", Some(Role::Bridge)),
    ("tunnel", Some(Role::Tunnel)),
    ("none", None),
];

/// The name of a role.
pub fn role_name(role: GivenRole) -> &'static str {
    let given = ROLES.iter().find(|(_, r)| *r == role).map_or("none", |(name, _)| name);
    if role == Some(Role::Loopback) { "loopback" } else { given }
}

/// What `--devices` says.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Selection {
    include: Vec<String>,
    exclude: Vec<String>,
    roles: Vec<(String, GivenRole)>,
}

/// What `--devices` says of one device.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Selected {
    /// Its role is found.
    Found,
    /// Its role is given.
    Given(GivenRole),
    /// It is left alone.
    Not,
}

impl Selection {
    /// Parses the flag's values.
    ///
    /// # Errors
    /// An empty item, a name no device can have, or an unknown role.
    pub fn parse(items: &[String]) -> Result<Self, Invalid> {
        const FLAG: &str = "devices";
        let mut selection = Self::default();
        for item in items {
            let (pattern, role) = match item.split_once('=') {
                Some((name, role)) => (name, Some(role)),
                None => (item.as_str(), None),
            };
            let pattern = match (pattern.strip_prefix('!'), role) {
                (Some(_), Some(_)) => return Err(Invalid::new(FLAG, item, "`!` and a role exclude each other")),
                (Some(rest), None) => {
                    selection.exclude.push(rest.to_owned());
                    rest
                }
                (None, Some(role)) => {
                    let Some((_, role)) = ROLES.iter().find(|(name, _)| *name == role) else {
                        let known = ROLES.map(|(name, _)| name).join(", ");
                        return Err(Invalid::new(FLAG, item, format!("no such role; there are {known}")));
                    };
                    selection.roles.push((pattern.to_owned(), *role));
                    pattern
                }
                (None, None) => {
                    selection.include.push(pattern.to_owned());
                    pattern
                }
            };
            // IFNAMSIZ is 16 with the closing NUL.
            let fits = !pattern.is_empty() && pattern.len() < 16 && !pattern.contains(['/', ' ', ':']);
            if !fits {
                return Err(Invalid::new(FLAG, item, "not a device name or pattern of 1 to 15 characters"));
            }
        }
        Ok(selection)
    }

    /// What the flag says of the device with this name. The last role given wins.
    pub fn of(&self, name: &str) -> Selected {
        if let Some((_, role)) = self.roles.iter().rev().find(|(pattern, _)| matches(pattern, name)) {
            return Selected::Given(*role);
        }
        let any = |patterns: &[String]| patterns.iter().any(|pattern| matches(pattern, name));
        if any(&self.exclude) || !self.include.is_empty() && !any(&self.include) {
            Selected::Not
        } else {
            Selected::Found
        }
    }
}

/// Shell-like match: `*` is any text, `?` one character.
fn matches(pattern: &str, name: &str) -> bool {
    let (pattern, name) = (pattern.as_bytes(), name.as_bytes());
    let (mut p, mut n) = (0, 0);
    // Where to go on if the text after the last star does not match after all.
    let mut retry: Option<(usize, usize)> = None;
    while n < name.len() {
        match pattern.get(p) {
            Some(b'*') => {
                retry = Some((p + 1, n));
                p += 1;
            }
            Some(c) if *c == b'?' || *c == name[n] => {
                p += 1;
                n += 1;
            }
            _ => match &mut retry {
                Some((after, from)) => {
                    *from += 1;
                    (p, n) = (*after, *from);
                }
                None => return false,
            },
        }
    }
    pattern[p..].iter().all(|c| *c == b'*')
}

#[cfg(test)]
mod tests {
    use super::*;

    fn selection(flag: &str) -> Result<Selection, Invalid> {
        Selection::parse(&flag.split(',').map(str::to_owned).collect::<Vec<_>>())
    }

    #[test]
    fn without_patterns_every_role_is_found() {
        assert_eq!(Selection::default().of("eth0"), Selected::Found);
    }

    #[test]
    fn patterns_limit_exclude_and_override() {
        let s = selection("eth*,cali?,!eth9,eth1=pod,eth1=uplink,tap*=none").unwrap();
        assert_eq!(s.of("eth0"), Selected::Found);
        assert_eq!(s.of("cali1"), Selected::Found);
        assert_eq!(s.of("cali12"), Selected::Not);
        assert_eq!(s.of("eth9"), Selected::Not);
        assert_eq!(s.of("eth1"), Selected::Given(Some(Role::Uplink)), "the last one wins");
        assert_eq!(s.of("tap7"), Selected::Given(None), "a role needs no pattern");
        assert_eq!(s.of("wlan0"), Selected::Not);
    }

    #[test]
    fn an_exclusion_alone_leaves_the_rest() {
        let s = selection("!docker0").unwrap();
        assert_eq!((s.of("docker0"), s.of("eth0")), (Selected::Not, Selected::Found));
    }

    #[test]
    fn stars_backtrack() {
        for (pattern, name, hit) in [
            ("*", "", true),
            ("a*b*c", "axxbyyc", true),
            ("a*b*c", "axxbyyd", false),
            ("*ab", "aab", true),
            ("a?", "a", false),
            ("", "a", false),
        ] {
            assert_eq!(matches(pattern, name), hit, "{pattern} {name}");
        }
    }

    #[test]
    fn nonsense_is_refused_by_name() {
        for bad in ["", "eth0=wan", "!eth0=pod", "a-name-of-16-char", "eth0/1"] {
            let error = selection(bad).unwrap_err();
            assert_eq!(error.value, bad);
        }
        assert!(selection("eth0=wan").unwrap_err().problem.contains("bridge-port"));
    }
}
