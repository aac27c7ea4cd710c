//! What there is of the objects that this node must hold: the lists of all members, merged.
//!
//! Always holds:
//! 1. An object is compared when every list has come past it: who has not named it did not have it when asked.
//! 2. Memory is for one page of each list and for what must be brought here, however many objects there are.

use std::collections::{BTreeSet, VecDeque};
use std::sync::Arc;

use bytes::Bytes;
use qemu_proto::oid::Oid;
use sheep_core::history::{Answer, Decision};
use sheep_core::member::NodeId;
use sheep_core::peer_message::{ListEntry, PeerKind, PeerRequest, Verdict};
use sheep_core::stamp::{Epoch, Version};

use super::{LIST_BATCH, PATIENCE, RecoveryEnd, agreement, holds, own_answer, wait_for_change};
use crate::data::Data;
use crate::data::holder::Holder;
use crate::data::view::View;

/// Lists what every member has of the objects this node must hold, confirms what is the newest already, and gives the
/// rest in ascending order.
pub async fn survey(data: &Data, holder: &Arc<Holder>, view: &Arc<View>) -> Result<BTreeSet<Oid>, RecoveryEnd> {
    let storing = view.state.members.values().filter(|member| !member.member.is_gateway());
    let others = storing.map(|member| member.member.id).filter(|node| *node != data.node());
    let mut lists: Vec<List> = others.map(List::of).collect();
    let mut own = OwnList::default();
    let mut work = BTreeSet::new();
    loop {
        for list in &mut lists {
            list.fill(data, holder, view.epoch()).await?;
        }
        own.fill(data, holder, view).await;
        let next = lists.iter().filter_map(List::next).chain(own.page.front().copied()).min();
        let Some(oid) = next else { return Ok(work) };
        own.page.pop_front_if(|own| *own == oid);
        // Every list says something about every object.
        let answers = lists.iter_mut().filter_map(|list| list.answer(oid)).collect();
        let turn = data.turns().turn(oid);
        let Ok(_guard) = turn.try_lock() else {
            // Somebody compares it already, and might put what is newer by then out of a copy that was called current.
            work.insert(oid);
            continue;
        };
        if holder.is_current(oid) {
            continue;
        }
        // What a writer left half-written has to be on all holders first, which the lists are no proof of.
        let is_sure = !holder.is_doubtful(oid) && is_newest_here(data, holder, view, oid, answers);
        if !is_sure || !holder.confirm(oid, view.epoch()) {
            work.insert(oid);
        }
    }
}

/// Whether the lists already say that this node's copy is the newest.
fn is_newest_here(data: &Data, holder: &Holder, view: &View, oid: Oid, mut answers: Vec<Answer>) -> bool {
    let Some(location) = view.locate(oid) else { return false };
    let Some(own) = own_answer(data, holder, oid) else { return false };
    answers.push(own);
    match view.history.decide(location.key, location.copies, &answers) {
        Decision::Newest { stamp, nodes } => {
            let is_everywhere = || agreement::lacking(view, &location, &answers, stamp).is_empty();
            nodes.contains(&data.node()) && (!agreement::is_open(view, &location) || is_everywhere())
        }
        Decision::Absent => {
            own.version.is_none() && agreement::having(view, &location, &answers, data.node()).is_empty()
        }
        Decision::Unheard(_) => false,
    }
}

/// What one other member has, in ascending order.
struct List {
    node: NodeId,
    /// The rest of the page that came last, with how far the member had everything when it sent it.
    page: VecDeque<(Oid, Version)>,
    page_clean_through: Epoch,
    /// Where the next page begins.
    after: Oid,
    /// How far the member had everything when it was asked first. What is not in the list it did not have when it was asked for
    /// that part. It may have got it since, and have everything by the end of the list: that says nothing of the parts before.
    clean_through: Option<Epoch>,
    is_complete: bool,
}

impl List {
    fn of(node: NodeId) -> List {
        List {
            node,
            page: VecDeque::new(),
            page_clean_through: Epoch(0),
            after: Oid::from_raw(0),
            clean_through: None,
            is_complete: false,
        }
    }

    /// Asks for the next page if this one is used up.
    async fn fill(&mut self, data: &Data, holder: &Arc<Holder>, epoch: Epoch) -> Result<(), RecoveryEnd> {
        while self.page.is_empty() && !self.is_complete {
            let mut request = PeerRequest::new(PeerKind::List, epoch, data.node());
            request.oid = self.after;
            let answer = data.links().call(self.node, request, Bytes::new(), PATIENCE).await;
            if holder.epoch() != epoch {
                return Err(RecoveryEnd::EpochOver);
            }
            match answer {
                Ok((answer, payload)) if answer.verdict == Verdict::Ok => {
                    self.page_clean_through = answer.clean_through;
                    self.clean_through.get_or_insert(answer.clean_through);
                    // Whatever a member sends, the list ascends and so ends.
                    let entries = ListEntry::decode_all(&payload).filter(|entry| entry.oid > self.after);
                    self.page = entries.map(|entry| (entry.oid, entry.version)).collect();
                    match self.page.back() {
                        Some((last, _)) => self.after = *last,
                        None => self.is_complete = true,
                    }
                }
                Ok(_) | Err(_) => wait_for_change(data, holder).await,
            }
        }
        Ok(())
    }

    fn next(&self) -> Option<Oid> {
        self.page.front().map(|(oid, _)| *oid)
    }

    /// What the member says about an object up to which everything was taken.
    fn answer(&mut self, oid: Oid) -> Option<Answer> {
        let named = self.page.pop_front_if(|(named, _)| *named == oid);
        let clean_through = if named.is_some() { Some(self.page_clean_through) } else { self.clean_through };
        let version = named.map(|(_, version)| version);
        // Lists do not tell whom a node met. What cannot be decided without it is compared.
        let (met_nobody, met_before) = (false, None);
        Some(Answer { node: self.node, version, clean_through: clean_through?, met_nobody, met_before })
    }
}

/// What this node has of what it must hold, in ascending order.
#[derive(Default)]
struct OwnList {
    page: VecDeque<Oid>,
    after: Option<Oid>,
    is_complete: bool,
}

impl OwnList {
    async fn fill(&mut self, data: &Data, holder: &Holder, view: &View) {
        while self.page.is_empty() && !self.is_complete {
            let entries = holder.store().entries(self.after, LIST_BATCH);
            match entries.last() {
                Some((last, _)) => self.after = Some(*last),
                None => self.is_complete = true,
            }
            self.page.extend(entries.iter().map(|(oid, _)| *oid).filter(|oid| holds(view, data.node(), *oid)));
            tokio::task::yield_now().await;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn who_does_not_name_an_object_says_that_it_was_not_there_when_first_asked() {
        let oid = |raw| Oid::from_raw(raw);
        let version = |epoch| Version { epoch: Epoch(epoch), ..Version::default() };
        let mut list = List::of(NodeId(7));
        assert!(list.answer(oid(1)).is_none(), "nothing was heard yet");
        list.clean_through = Some(Epoch(3));
        list.page_clean_through = Epoch(5);
        list.page = [(oid(2), version(4)), (oid(9), version(5))].into();
        let mut said = |raw| list.answer(oid(raw)).map(|answer| (answer.version, answer.clean_through.0));
        assert_eq!(said(1), Some((None, 3)));
        assert_eq!(said(2), Some((Some(version(4)), 5)));
        assert_eq!(said(8), Some((None, 3)));
        assert_eq!(said(9), Some((Some(version(5)), 5)));
        assert_eq!(said(10), Some((None, 3)), "the list is at its end");
    }
}
