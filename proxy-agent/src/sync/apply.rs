//! How a change is carried out, and what becomes of one that fails.

use std::time::Duration;

use tracing::{debug, info, trace, warn};

use super::{Answer, Change, Dataplane, DataplaneError, Desired, Grace, MapOp, Subject, Sync, plan};
use crate::dataplane::settings::around;

fn report(answer: &Answer) {
    match answer {
        Answer::Given => {}
        Answer::Node(addresses) if addresses.is_empty() => warn!(
            "the API server knows no address of this node: NodePorts are answered at all of its addresses; give \
             --node-name the name of its Node, or --nodeport-addresses"
        ),
        Answer::Node(addresses) => info!(?addresses, "the Node says which addresses answer NodePorts"),
    }
}

impl<D: Dataplane> Sync<D> {
    pub(super) fn sync_service(&mut self, desired: &Desired, now: Duration) {
        let subject = Subject::Service(desired.service.clone());
        if self.board.unserved(&subject, &desired.unserved) {
            for unserved in &desired.unserved {
                warn!(service = %desired.service, %unserved, "part of a Service is not served");
            }
        }
        match self.ledger.change(desired, now) {
            Ok(change) => self.carry_out(change, Some(desired), now),
            Err(error) => self.refuse(&subject, &error, now),
        }
        if self.index.service(&desired.service).is_none() {
            self.board.forget(&subject);
        }
    }

    pub(super) fn sync_node(&mut self, now: Duration) {
        let answer = self.node_ports.answer(&self.index);
        let Some(addrs) = self.index.node_addrs().map(|addrs| answer.apply(addrs)) else { return };
        let change = self.ledger.change_node(&addrs);
        self.carry_out(change, None, now);
        self.addresses = Some(addrs);
        if self.answer.as_ref() != Some(&answer) {
            report(&answer);
            self.answer = Some(answer);
        }
    }

    pub(super) fn sync_service_cidrs(&mut self, now: Duration) {
        let wanted = self.index.service_cidrs();
        let change = self.ledger.change_service_cidrs(&wanted);
        self.carry_out(change, None, now);
        self.service_networks = Some([true, false].into_iter().filter_map(|ipv4| around(&wanted, ipv4)).collect());
    }

    /// Prepare and commit; the rest waits for a grace period.
    pub(super) fn carry_out(&mut self, change: Change, desired: Option<&Desired>, now: Duration) {
        if let Err(error) = self.write_all(change.prepare.iter().chain(&change.commit)) {
            return self.refuse(&change.subject, &error, now);
        }
        self.ledger.finish(&change, desired);
        self.tally.done += u64::from(!change.is_empty());
        if let Some(desired) = desired {
            self.reached(desired);
        }
        // Words that came to rest do not make up for a plan that failed.
        let whole = desired.is_some() || !matches!(change.subject, Subject::Service(_));
        if whole && self.board.done(&change.subject) {
            warn!(subject = %change.subject, "a change that had failed is done");
        }
        if !change.is_empty() {
            debug!(subject = %change.subject, writes = change.prepare.len() + change.commit.len(), "done");
            self.bury(change);
        }
    }

    /// A Service is in the kernel as it should be.
    fn reached(&mut self, desired: &Desired) {
        let name = &desired.service;
        self.programmed.extend(self.triggers.take(name));
        let check = plan::health::health_check(&self.index, name, self.ipv6);
        let before = match check {
            Some(check) => self.checks.insert(name.clone(), check),
            None if mutant!("rule-127") => self.checks.get(name).copied(),
            None => self.checks.remove(name),
        };
        self.checks_moved |= before != check;
    }

    /// A subject's change failed. It is tried again later, and nothing else waits for it.
    fn refuse(&mut self, subject: &Subject, error: &DataplaneError, now: Duration) {
        self.tally.failed += 1;
        let (pause, new) = self.board.failed(subject, error, now);
        if new {
            warn!(%subject, %error, retry_ms = pause.as_millis() as u64, "a change failed; all else goes on");
        }
        let Subject::Service(name) = subject else { return };
        self.ledger.abort(name, now);
        if !self.ledger.is_installed(name) {
            self.withdraw(&Desired::nothing(name.clone()), now);
        }
    }

    /// A Service that never was complete is not half served.
    fn withdraw(&mut self, nothing: &Desired, now: Duration) {
        let Ok(change) = self.ledger.change(nothing, now) else { return };
        if self.write_all(change.prepare.iter().chain(&change.commit)).is_ok() {
            self.ledger.finish(&change, Some(nothing));
            self.bury(change);
        } else {
            self.ledger.abort(&nothing.service, now);
        }
    }

    fn bury(&mut self, change: Change) {
        if !change.frees.is_empty() || !change.retire.is_empty() {
            self.graves.new.push(change);
        }
    }

    fn write_all<'a>(&mut self, ops: impl IntoIterator<Item = &'a MapOp>) -> Result<(), DataplaneError> {
        ops.into_iter().try_for_each(|op| self.write(op))
    }

    pub(super) fn write(&mut self, op: &MapOp) -> Result<(), DataplaneError> {
        trace!(?op, "write");
        self.dataplane.write(op)?;
        self.tally.writes += 1;
        self.ledger.record(op);
        Ok(())
    }

    /// A grace period for the changes that wait for one, unless one is under way already. Whoever runs it tells
    /// [`Self::grace_over`].
    pub fn begin_grace(&mut self) -> Option<Grace> {
        if self.graves.under_way || self.graves.new.is_empty() {
            return None;
        }
        self.graves.under_way = true;
        self.graves.waiting.append(&mut self.graves.new);
        Some(self.dataplane.grace())
    }

    /// The grace period has ended. If it failed, its changes wait for another.
    pub fn grace_over(&mut self, result: Result<(), DataplaneError>) {
        self.graves.under_way = false;
        match result {
            Ok(()) => self.graves.over.append(&mut self.graves.waiting),
            Err(error) => {
                warn!(%error, "a grace period failed: slots and ids stay in use until one succeeds");
                self.graves.new.append(&mut self.graves.waiting);
            }
        }
        self.retire();
    }

    /// Retires what has waited long enough. What fails is tried again with the next step.
    pub(super) fn retire(&mut self) {
        for change in std::mem::take(&mut self.graves.over) {
            match self.write_all(&change.retire) {
                Ok(()) => self.ledger.release(&change.frees),
                Err(error) => {
                    debug!(subject = %change.subject, %error, "its old slots and names stay for now");
                    self.graves.over.push(change);
                }
            }
        }
    }
}
