//! Which volumes this node's clients have open, in a cluster that enforces locks (`dog cluster format -l`).
//!
//! QEMU's driver connects for its data, says nothing there, asks LOCK_VDI on another connection, and closes that one. So a lock
//! belongs to the silent connections that its host had then, or to the asking one if there were none. What a connection
//! writes tells later which of them it is.
//!
//! Always holds:
//! 1. Two clients have the same working VDI locked at no time: the cluster's order decides.
//! 2. A lock ends when its client releases it, when an operator says so, 5 s (`GRACE`) after the last connection that may be its
//!    client's has ended, and when this node is no member any more. No snapshot ends it or leaves it behind.
//! 3. Snapshots are never locked, and I/O needs no lock: a client that lost its connection goes on without asking again.
//!
//! With locks enforced a guest cannot migrate live: its target opens the volume while the source still has it.

use std::collections::{BTreeMap, BTreeSet};
use std::net::SocketAddr;
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use qemu_proto::oid::VdiId;
use qemu_proto::status::Status;
use sheep_core::cluster_state::ClusterState;
use sheep_core::command::{Command, Outcome as Ordered};
use sheep_core::vdi_name::Target;

use super::Front;
use super::wire_status::of_refusal;

/// How long a client may be without a connection: QEMU tries once a second.
const GRACE: Duration = Duration::from_secs(5);
/// Between attempts to give a lock back while the cluster's order is out of reach.
const RETRY_INTERVAL: Duration = Duration::from_secs(1);

/// See the module.
#[derive(Default)]
pub struct Locks(Mutex<Table>);

#[derive(Default)]
struct Table {
    last: u64,
    clients: BTreeMap<u64, Client>,
    held: BTreeMap<Vec<u8>, Held>,
}

/// A connection.
struct Client {
    host: String,
    is_silent: bool,
    /// What it wrote to last.
    uses: Option<Vec<u8>>,
}

struct Held {
    token: u64,
    host: String,
    /// The connections of which one is the client's.
    clients: BTreeSet<u64>,
}

/// The machine, without the port.
fn host_of(peer: &str) -> String {
    peer.parse::<SocketAddr>().map_or_else(|_| "here".to_owned(), |address| address.ip().to_canonical().to_string())
}

impl Table {
    /// Connections of a host that have the volume open, as far as one can tell.
    fn may_use(&self, host: &str, name: &[u8]) -> BTreeSet<u64> {
        let may = |client: &Client| client.host == host && (client.is_silent || client.uses.as_deref() == Some(name));
        self.clients.iter().filter(|(_, client)| may(client)).map(|(number, _)| *number).collect()
    }
}

impl Locks {
    fn table(&self) -> MutexGuard<'_, Table> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// A connection begins; gives its number.
    pub fn arrived(&self, peer: &str) -> u64 {
        let mut table = self.table();
        table.last += 1;
        let number = table.last;
        table.clients.insert(number, Client { host: host_of(peer), is_silent: true, uses: None });
        number
    }

    /// A connection sent something: nothing in particular, or a write to a volume of this name.
    fn spoke(&self, number: u64, uses: Option<Vec<u8>>) {
        let mut table = self.table();
        let Some(client) = table.clients.get_mut(&number) else { return };
        client.is_silent = false;
        let Some(name) = uses else { return };
        let host = client.host.clone();
        client.uses = Some(name.clone());
        for (held_name, held) in &mut table.held {
            if *held_name == name && held.host == host {
                held.clients = BTreeSet::from([number]);
            } else if held.clients.len() > 1 {
                held.clients.remove(&number);
            }
        }
    }

    /// A lock was granted to a client that asked on this connection.
    fn hold(&self, name: &[u8], token: u64, number: u64) {
        let mut table = self.table();
        let Some(host) = table.clients.get(&number).map(|client| client.host.clone()) else { return };
        let silent = |(other, client): (&u64, &Client)| {
            (*other != number && client.is_silent && client.host == host).then_some(*other)
        };
        let mut clients: BTreeSet<u64> = table.clients.iter().filter_map(silent).collect();
        if clients.is_empty() {
            clients.insert(number);
        }
        table.held.insert(name.to_vec(), Held { token, host, clients });
    }

    /// The token of a lock that a client of this node has.
    fn token(&self, name: &[u8]) -> Option<u64> {
        self.table().held.get(name).map(|held| held.token)
    }

    fn forget(&self, name: &[u8], token: u64) {
        let mut table = self.table();
        if table.held.get(name).is_some_and(|held| held.token == token) {
            table.held.remove(name);
        }
    }

    /// A connection ended; gives the locks whose client it may have been, if no other connection may be the client's.
    fn left(&self, number: u64) -> Vec<(Vec<u8>, u64)> {
        let mut table = self.table();
        table.clients.remove(&number);
        let abandoned = |(name, held): (&Vec<u8>, &mut Held)| {
            let is_last = held.clients.remove(&number) && held.clients.is_empty();
            is_last.then(|| (name.clone(), held.token))
        };
        table.held.iter_mut().filter_map(abandoned).collect()
    }

    /// Whether the client of a lock has not come back.
    fn is_gone(&self, name: &[u8], token: u64) -> bool {
        let mut table = self.table();
        let Some(held) = table.held.get(name).filter(|held| held.token == token && held.clients.is_empty()) else {
            return false;
        };
        let back = table.may_use(&held.host, name);
        match table.held.get_mut(name) {
            Some(held) if !back.is_empty() => {
                held.clients = back;
                false
            }
            _ => true,
        }
    }
}

/// A connection sent a request; `wrote` is the VDI if it changes one.
pub fn note(front: &Front, number: u64, wrote: Option<VdiId>) {
    let state = &front.data.view().state;
    let name = wrote.and_then(|vdi| state.vdis.get(&vdi.get())).map(|vdi| vdi.name.clone());
    front.locks.spoke(number, name);
}

/// Locks the working VDI of a name for the client on this connection, if the cluster enforces locks.
pub async fn lock(front: &Front, name: &[u8]) -> Result<(), Status> {
    if !front.data.view().state.enforces_locks() {
        return Ok(());
    }
    let token = front.data.world().rng.next_u64();
    let command = Command::LockVdi { name: name.to_vec(), node: front.data.node(), token };
    match front.data.cluster().propose(command).await {
        Ok(Ordered::Refused(refusal)) => Err(of_refusal(refusal)),
        Ok(_) => {
            front.locks.hold(name, token, front.connection);
            if front.locks.token(name) != Some(token) {
                // The connection has ended meanwhile.
                give_back(front.clone(), name.to_vec(), token).await;
            }
            Ok(())
        }
        Err(error) => {
            tracing::warn!("cannot order a lock: {error}");
            // It may have been ordered all the same.
            tokio::spawn(give_back(front.clone(), name.to_vec(), token));
            Err(Status::ClusterError)
        }
    }
}

/// RELEASE_VDI: by its client, or (`by_force`) by an operator. Whoever opened a snapshot closes it without having a lock.
pub async fn release(front: &Front, vdi: VdiId, by_force: bool) {
    let state = front.data.view().state.clone();
    let Some(name) = working_name(&state, vdi) else { return };
    let token = front.locks.token(&name);
    if by_force {
        unlock(front, &name, None).await;
    } else if token.is_some() {
        unlock(front, &name, token).await;
    }
    if let Some(token) = token {
        front.locks.forget(&name, token);
    }
}

fn working_name(state: &ClusterState, vdi: VdiId) -> Option<Vec<u8>> {
    let name = &state.live_vdi(vdi)?.name;
    (state.lookup(name, Target::Current) == Ok(vdi)).then(|| name.clone())
}

async fn unlock(front: &Front, name: &[u8], token: Option<u64>) -> bool {
    let command = Command::UnlockVdi { name: name.to_vec(), token };
    match front.data.cluster().propose(command).await {
        Ok(_) => true,
        Err(error) => {
            tracing::warn!("cannot give back the lock of VDI {} yet: {error}", String::from_utf8_lossy(name));
            false
        }
    }
}

/// A connection has ended: gives back the locks of its client, unless that comes back soon.
pub fn left(front: &Front) {
    for (name, token) in front.locks.left(front.connection) {
        let front = front.clone();
        tokio::spawn(async move {
            front.data.world().clock.sleep(GRACE).await;
            if !front.locks.is_gone(&name, token) {
                return;
            }
            give_back(front, name, token).await;
        });
    }
}

async fn give_back(front: Front, name: Vec<u8>, token: u64) {
    while !unlock(&front, &name, Some(token)).await {
        front.data.world().clock.sleep(RETRY_INTERVAL).await;
    }
    front.locks.forget(&name, token);
}

#[cfg(test)]
mod tests {
    use super::*;

    const PEER: &str = "127.0.0.1:4000";

    #[test]
    fn a_lock_belongs_to_the_silent_connection_of_its_host() {
        let locks = Locks::default();
        let elsewhere = locks.arrived("10.0.0.9:1");
        let data = locks.arrived(PEER);
        let control = locks.arrived(PEER);
        locks.spoke(control, None);
        locks.hold(b"vm", 7, control);
        assert_eq!(locks.left(control), []);
        assert_eq!(locks.left(elsewhere), []);
        assert_eq!(locks.left(data), [(b"vm".to_vec(), 7)]);
        assert!(locks.is_gone(b"vm", 7));
        // Another opening that nobody has to give back.
        assert!(!locks.is_gone(b"vm", 8));
    }

    #[test]
    fn a_client_that_keeps_its_connection_has_the_lock_as_long() {
        let locks = Locks::default();
        let only = locks.arrived(PEER);
        locks.spoke(only, None);
        locks.hold(b"vm", 7, only);
        assert_eq!(locks.left(only), [(b"vm".to_vec(), 7)]);
        locks.forget(b"vm", 7);
        assert_eq!(locks.token(b"vm"), None);
    }

    #[test]
    fn writing_tells_which_of_two_it_is() {
        let locks = Locks::default();
        let [one, two, control] = [0; 3].map(|_| locks.arrived(PEER));
        locks.spoke(control, None);
        locks.hold(b"vm", 7, control);
        locks.hold(b"other", 8, control);
        locks.spoke(two, Some(b"vm".to_vec()));
        assert_eq!(locks.left(one), [(b"other".to_vec(), 8)]);
        assert_eq!(locks.left(two), [(b"vm".to_vec(), 7)]);
    }

    #[test]
    fn a_client_may_connect_again() {
        let locks = Locks::default();
        let data = locks.arrived(PEER);
        let control = locks.arrived(PEER);
        locks.spoke(control, None);
        locks.hold(b"vm", 7, control);
        let _ = locks.left(control);
        assert_eq!(locks.left(data).len(), 1);
        let again = locks.arrived(PEER);
        assert!(!locks.is_gone(b"vm", 7), "it is silent yet, but may be the one");
        assert_eq!(locks.left(again).len(), 1);
        let busy = locks.arrived(PEER);
        locks.spoke(busy, Some(b"other".to_vec()));
        assert!(locks.is_gone(b"vm", 7), "this one is busy with another volume");
    }
}
