//! What caused the changes that wait to be served, and when: for the time from there to the kernel (rule 135).

use std::collections::BTreeMap;
use std::time::Duration;

use crate::model::{EndpointSlice, IpFamily, ObjectName};

/// Times since 1970 by Service and family.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Triggers(BTreeMap<ObjectName, [Heard; 2]>);

#[derive(Clone, Debug, Default, PartialEq, Eq)]
struct Heard {
    /// A slice went: what was heard before counts no more.
    afresh: bool,
    times: Vec<Duration>,
}

impl Triggers {
    /// A slice came or changed. One event, one time.
    pub fn put(&mut self, slice: &EndpointSlice) {
        if let Some(time) = slice.trigger.0 {
            self.heard(&slice.service, slice.family).times.push(time);
        }
    }

    /// A slice went. Its annotation is of its last update, and says nothing of this one.
    pub fn removed(&mut self, slice: &EndpointSlice) {
        *self.heard(&slice.service, slice.family) = Heard { afresh: true, times: Vec::new() };
    }

    /// Adds what was heard later.
    pub fn merge(&mut self, later: Self) {
        for (service, families) in later.0 {
            let known = self.0.entry(service).or_default();
            for (known, later) in known.iter_mut().zip(families) {
                if later.afresh {
                    *known = later;
                } else {
                    known.times.extend(later.times);
                }
            }
        }
    }

    /// The Service is as it should be: its times, which are forgotten.
    pub fn take(&mut self, service: &ObjectName) -> impl Iterator<Item = (IpFamily, Duration)> {
        let families = self.0.remove(service).unwrap_or_default();
        IpFamily::ALL
            .into_iter()
            .zip(families)
            .flat_map(|(family, heard)| heard.times.into_iter().map(move |time| (family, time)))
    }

    fn heard(&mut self, service: &ObjectName, family: IpFamily) -> &mut Heard {
        let [v4, v6] = self.0.entry(service.clone()).or_default();
        match family {
            IpFamily::V4 => v4,
            IpFamily::V6 => v6,
        }
    }
}
