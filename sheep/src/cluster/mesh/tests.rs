//! Meshes on loopback: who passes, who does not and why, what breaks and how it is told, and bytes of hostile neighbours.

#[cfg(test)]
mod on_loopback {
    use std::collections::{BTreeMap, BTreeSet};
    use std::io;
    use std::net::SocketAddr;
    use std::pin::Pin;
    use std::sync::{Arc, Mutex};
    use std::time::Duration;

    use bytes::Bytes;
    use sheep_core::admission::{ClusterKey, Fingerprint};
    use sheep_core::member::NodeId;
    use sheep_core::node_handshake::{Hello, MESH_VERSION, Message, OPEN_MAGIC, PREFIX_BYTES, Prefix, Proof, Role};
    use tokio::io::{AsyncReadExt, AsyncWriteExt};
    use tokio::net::{TcpListener, TcpStream};
    use tokio::sync::mpsc;
    use tokio::time::timeout;

    use super::super::tls::{Session, Tls};
    use super::super::{
        BODY_BYTES_MAX, Channel, ContactError, Direction, Event, Identity, Mesh, MeshConfig, Peer, Reach, Rejection,
        Service, Standing, Trust, Unreachable,
    };
    use crate::world::World;
    use crate::world::net::{Connection, Endpoint};

    const SOON: Duration = Duration::from_secs(10);

    #[derive(Clone, Default)]
    struct Rules {
        cluster: Option<u64>,
        open: bool,
        key: Option<ClusterKey>,
        pins: BTreeMap<NodeId, Fingerprint>,
        banned: BTreeSet<Fingerprint>,
    }

    struct TestTrust(Mutex<Rules>);

    impl Trust for TestTrust {
        fn cluster(&self) -> Option<u64> {
            self.0.lock().unwrap().cluster
        }

        fn is_open(&self) -> bool {
            self.0.lock().unwrap().open
        }

        fn key(&self) -> Option<ClusterKey> {
            self.0.lock().unwrap().key.clone()
        }

        fn judge(
            &self,
            node: NodeId,
            fingerprint: &Fingerprint,
            cluster: Option<u64>,
            proved: bool,
        ) -> Result<Standing, Rejection> {
            let rules = self.0.lock().unwrap();
            if rules.banned.contains(fingerprint) {
                return Err(Rejection::Banned);
            }
            if let (Some(ours), Some(theirs)) = (rules.cluster, cluster)
                && ours != theirs
            {
                return Err(Rejection::OtherCluster { ours, theirs });
            }
            match rules.pins.get(&node) {
                _ if rules.open => Ok(Standing::Member),
                Some(pin) if pin == fingerprint => Ok(Standing::Member),
                Some(_) => Err(Rejection::Replaced),
                None if proved => Ok(Standing::Keyholder),
                None => Ok(Standing::Stranger),
            }
        }

        fn card(&self) -> Vec<u8> {
            b"card".to_vec()
        }
    }

    /// Answers with the message and what the asker is; never answers "hang".
    struct Echo;

    impl Service for Echo {
        fn handle(&self, from: Arc<Peer>, message: Bytes) -> Pin<Box<dyn Future<Output = Vec<u8>> + Send>> {
            Box::pin(async move {
                if message.as_ref() == b"hang" {
                    std::future::pending::<()>().await;
                }
                if message.as_ref() == b"who" {
                    return format!("{} {:?}", from.node, from.standing).into_bytes();
                }
                message.to_vec()
            })
        }
    }

    struct Node {
        id: NodeId,
        mesh: Arc<Mesh>,
        events: mpsc::Receiver<Event>,
        trust: Arc<TestTrust>,
        identity: Identity,
        address: SocketAddr,
    }

    impl Node {
        async fn start(id: u64, rules: Rules) -> Node {
            Node::start_at(
                id,
                rules,
                Identity::generate(&crate::world::rng::OsRng).unwrap(),
                "127.0.0.1:0".parse().unwrap(),
            )
            .await
        }

        async fn start_at(id: u64, rules: Rules, identity: Identity, listen: SocketAddr) -> Node {
            Node::start_process(id, id * 100, rules, identity, listen).await
        }

        async fn start_process(id: u64, boot: u64, rules: Rules, identity: Identity, listen: SocketAddr) -> Node {
            let mut config = MeshConfig::new(NodeId(id), boot, vec![listen], vec!["0.0.0.0:0".parse().unwrap()]);
            config.timing.handshake = Duration::from_millis(500);
            config.timing.ping = Duration::from_millis(50);
            config.timing.silence = Duration::from_millis(500);
            let trust = Arc::new(TestTrust(Mutex::new(rules)));
            let (mesh, events) =
                Mesh::start(world(), config, identity.clone(), trust.clone(), Arc::new(Echo)).await.unwrap();
            let address = mesh.local()[0];
            Node { id: NodeId(id), mesh, events, trust, identity, address }
        }

        fn set(&self, change: impl FnOnce(&mut Rules)) {
            change(&mut self.trust.0.lock().unwrap());
        }

        fn pin(&self, other: &Node) {
            self.set(|rules| {
                rules.pins.insert(other.id, other.identity.fingerprint());
            });
        }

        /// The next event that is not `Met`.
        async fn event(&mut self) -> Event {
            loop {
                match timeout(SOON, self.events.recv()).await.expect("an event").expect("the mesh lives") {
                    Event::Met(_) => {}
                    event => return event,
                }
            }
        }

        async fn rejected(&mut self) -> Rejection {
            match self.event().await {
                Event::Rejected { rejection, .. } => rejection,
                other => panic!("{other:?}"),
            }
        }

        async fn up(&mut self) -> Arc<Peer> {
            match self.event().await {
                Event::Up(peer) => peer,
                other => panic!("{other:?}"),
            }
        }

        async fn ask(&self, other: &Node, message: &[u8]) -> Result<Bytes, Unreachable> {
            self.mesh.call(other.id, message.to_vec(), SOON).await
        }
    }

    fn world() -> World {
        World::real(1).unwrap()
    }

    fn key(generation: u32, byte: u8) -> ClusterKey {
        ClusterKey { generation, secret: [byte; 32] }
    }

    fn in_cluster(key: Option<ClusterKey>) -> Rules {
        Rules { cluster: Some(1), key, ..Rules::default() }
    }

    async fn members() -> (Node, Node) {
        let (a, b) = (Node::start(1, in_cluster(None)).await, Node::start(2, in_cluster(None)).await);
        a.pin(&b);
        b.pin(&a);
        (a, b)
    }

    /// Both sides are told the same reason, each in its own words.
    async fn refused(dialer: &mut Node, listener: &mut Node, expected: Rejection) {
        let error = dialer.mesh.contact(listener.address).await.unwrap_err();
        assert!(matches!(error, ContactError::Rejected(rejection) if rejection == expected), "{error}");
        assert_eq!(dialer.rejected().await, expected);
        assert_eq!(listener.rejected().await, expected.for_the_other_side());
    }

    #[tokio::test]
    async fn a_pinned_member_passes_and_asks() {
        let (mut a, mut b) = members().await;
        a.mesh.know(b.id, vec![b.address]);
        let peer = a.up().await;
        assert_eq!((peer.node, peer.boot, peer.cluster), (b.id, 200, Some(1)));
        assert_eq!(peer.standing, Standing::Member);
        assert_eq!((peer.fingerprint, peer.card.as_slice()), (b.identity.fingerprint(), &b"card"[..]));
        assert_eq!(peer.addresses, [b.address]);
        assert_eq!(a.ask(&b, b"who").await.unwrap(), "0000000000000001 Member");
        let Event::Met(met) = b.events.recv().await.unwrap() else { panic!() };
        assert_eq!((met.node, &met.addresses), (a.id, &vec![a.address]));
        let mut sending = a.mesh.secrets();
        let mut receiving = b.mesh.secrets();
        let (sending, receiving) = (sending.recv().await.unwrap(), receiving.recv().await.unwrap());
        assert_eq!((sending.peer, sending.direction), (b.id, Direction::Sending));
        assert_eq!((receiving.peer, receiving.direction), (a.id, Direction::Receiving));
        assert!(sending.secret == receiving.secret);
        let report = &a.mesh.links()[0];
        assert!(report.node == b.id && report.up && report.address == Some(b.address));
        while a.mesh.links()[0].rtt.is_none() {
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
        let rtt = a.mesh.links()[0].rtt.unwrap();
        assert!(rtt.min_us <= rtt.mean_us && rtt.mean_us <= rtt.p99_us && rtt.p99_us < 1_000_000);
        // only once
        assert!(a.mesh.secrets().recv().await.is_none());
    }

    #[tokio::test]
    async fn a_keyholder_passes() {
        let (a, b) =
            (Node::start(1, in_cluster(Some(key(1, 7)))).await, Node::start(2, in_cluster(Some(key(1, 7)))).await);
        assert_eq!(a.mesh.contact(b.address).await.unwrap().standing, Standing::Keyholder);
        let (_, who) = a.mesh.call_at(b.address, b"who".to_vec(), SOON).await.unwrap();
        assert_eq!(who, "0000000000000001 Keyholder");
        a.mesh.know(b.id, vec![b.address]);
        a.mesh.dial_data(b.id).await.unwrap();
        // the one-off connections share no secret, the kept one does
        assert_eq!(b.mesh.secrets().recv().await.unwrap().peer, a.id);
    }

    #[tokio::test]
    async fn a_stranger_asks_and_gets_nothing_else() {
        let (mut a, mut b) =
            (Node::start(1, Rules::default()).await, Node::start(2, in_cluster(Some(key(1, 7)))).await);
        a.mesh.know(b.id, vec![b.address]);
        assert_eq!(a.up().await.standing, Standing::Stranger);
        assert_eq!(a.ask(&b, b"who").await.unwrap(), "0000000000000001 Stranger");
        let error = a.mesh.dial_data(b.id).await.err().unwrap();
        assert_eq!(error.kind(), io::ErrorKind::PermissionDenied);
        assert!(error.to_string().contains("dog node admit"), "{error}");
        assert_eq!(b.rejected().await, Rejection::NotAdmitted);
        assert!(a.mesh.secrets().try_recv().is_err() && b.mesh.secrets().try_recv().is_err());
    }

    #[tokio::test]
    async fn who_may_not_come_in_hears_why_and_so_does_the_other() {
        let (mut a, mut b) =
            (Node::start(1, in_cluster(Some(key(2, 7)))).await, Node::start(2, in_cluster(Some(key(2, 8)))).await);
        refused(&mut a, &mut b, Rejection::WrongKey).await;
        b.set(|rules| rules.key = Some(key(3, 8)));
        refused(&mut a, &mut b, Rejection::OldKey { ours: 2, theirs: 3 }).await;
        // the listener's key is the older one: its own judgement is that of a stranger, the dialer says no
        b.set(|rules| rules.key = Some(key(1, 8)));
        refused(&mut a, &mut b, Rejection::OldKey { ours: 2, theirs: 1 }).await;
        b.set(|rules| rules.cluster = Some(9));
        refused(&mut a, &mut b, Rejection::OtherCluster { ours: 1, theirs: 9 }).await;
        b.set(|rules| rules.cluster = Some(1));
        b.set(|rules| rules.banned.extend([a.identity.fingerprint()]));
        refused(&mut a, &mut b, Rejection::Banned).await;
        b.set(|rules| rules.banned.clear());
        b.set(|rules| rules.pins.extend([(NodeId(1), Fingerprint([3; 32]))]));
        refused(&mut a, &mut b, Rejection::Replaced).await;
        b.set(|rules| rules.pins.clear());
        let mut c = Node::start(3, Rules::default()).await;
        let (copy, anywhere) = (Identity::generate(&crate::world::rng::OsRng).unwrap(), "127.0.0.1:0".parse().unwrap());
        let mut d = Node::start_process(3, 301, Rules::default(), copy, anywhere).await;
        refused(&mut c, &mut d, Rejection::SameNode).await;
        // Its own address is no copy: only the side that dialed hears of it.
        assert!(matches!(c.mesh.contact(c.address).await, Err(ContactError::Rejected(Rejection::SameNode))));
        assert_eq!(c.rejected().await, Rejection::SameNode);
        // the dialer judges as well
        a.set(|rules| rules.key = Some(key(1, 8)));
        a.set(|rules| rules.banned.extend([b.identity.fingerprint()]));
        refused(&mut a, &mut b, Rejection::Banned).await;
    }

    #[tokio::test]
    async fn a_member_that_was_away_while_the_key_was_replaced_is_known_by_its_certificate() {
        let (a, b) = members().await;
        a.set(|rules| rules.key = Some(key(1, 1)));
        b.set(|rules| rules.key = Some(key(2, 2)));
        assert_eq!(a.mesh.contact(b.address).await.unwrap().standing, Standing::Member);
        assert_eq!(b.mesh.contact(a.address).await.unwrap().standing, Standing::Member);
    }

    #[tokio::test]
    async fn a_link_leads_to_the_node_it_is_for() {
        let (mut a, b) = members().await;
        a.mesh.know(NodeId(77), vec![b.address]);
        a.mesh.know(b.id, vec![b.address]);
        assert_eq!(a.up().await.node, b.id);
        assert_eq!(a.mesh.call(NodeId(77), vec![], Duration::from_millis(50)).await, Err(Unreachable));
        assert_eq!(a.mesh.call(NodeId(78), vec![], SOON).await, Err(Unreachable));
        assert_eq!(a.mesh.probe(NodeId(77), SOON).await, Reach::Silent);
    }

    async fn raw(tls: &Tls, address: SocketAddr) -> (Connection, Session) {
        let connection = world().net.connect(&Endpoint::Tcp(address)).await.unwrap();
        tls.dial(connection).await.unwrap()
    }

    async fn receive(connection: &mut Connection) -> (u32, Message) {
        let mut prefix = [0; PREFIX_BYTES];
        connection.reader.read_exact(&mut prefix).await.unwrap();
        let prefix = Prefix::decode(&prefix).unwrap();
        let mut body = vec![0; prefix.length];
        connection.reader.read_exact(&mut body).await.unwrap();
        (prefix.version, Message::decode(&body).unwrap())
    }

    /// Whether the other side hangs up soon.
    async fn hangs_up(reader: &mut (dyn tokio::io::AsyncRead + Send + Unpin)) {
        let mut bytes = Vec::new();
        let _ = timeout(SOON, reader.read_to_end(&mut bytes)).await.expect("it hangs up");
    }

    fn node_hello(channel: Channel) -> Hello {
        Hello { node: NodeId(50), channel, ..Hello::for_client([1, 2]) }
    }

    #[tokio::test]
    async fn another_version_is_told_so_on_both_sides() {
        let mut b = Node::start(2, Rules::default()).await;
        let tls = Tls::new(&Identity::generate(&crate::world::rng::OsRng).unwrap()).unwrap();
        let (mut connection, _) = raw(&tls, b.address).await;
        // a body that this version cannot read
        let mut bytes = Message::Accepted.encode();
        bytes[8..12].copy_from_slice(&9_u32.to_le_bytes());
        bytes[12..16].copy_from_slice(&3_u32.to_le_bytes());
        bytes.truncate(PREFIX_BYTES);
        bytes.extend_from_slice(&[0xff; 3]);
        connection.writer.write_all(&bytes).await.unwrap();
        connection.writer.flush().await.unwrap();
        let (version, message) = receive(&mut connection).await;
        assert_eq!(version, MESH_VERSION);
        assert_eq!(message, Message::Rejected(Rejection::OtherVersion { ours: 9, theirs: MESH_VERSION }));
        assert_eq!(b.rejected().await, Rejection::OtherVersion { ours: MESH_VERSION, theirs: 9 });

        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = listener.local_addr().unwrap();
        let other = tokio::spawn(async move {
            let (stream, _) = listener.accept().await.unwrap();
            let (reader, writer) = stream.into_split();
            let connection = Connection { reader: Box::new(reader), writer: Box::new(writer), peer: String::new() };
            let (mut connection, _) = tls.accept(connection).await.unwrap();
            receive(&mut connection).await;
            connection.writer.write_all(&bytes).await.unwrap();
            connection.writer.flush().await.unwrap();
            hangs_up(&mut *connection.reader).await;
        });
        let error = b.mesh.contact(address).await.unwrap_err();
        let expected = Rejection::OtherVersion { ours: MESH_VERSION, theirs: 9 };
        assert!(matches!(error, ContactError::Rejected(rejection) if rejection == expected), "{error}");
        other.await.unwrap();
    }

    /// Speaks TLS with both sides and passes everything on.
    async fn man_in_the_middle(target: SocketAddr) -> SocketAddr {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = listener.local_addr().unwrap();
        tokio::spawn(async move {
            let tls = Tls::new(&Identity::generate(&crate::world::rng::OsRng).unwrap()).unwrap();
            loop {
                let (stream, _) = listener.accept().await.unwrap();
                let (reader, writer) = stream.into_split();
                let near = Connection { reader: Box::new(reader), writer: Box::new(writer), peer: String::new() };
                let (mut near, _) = tls.accept(near).await.unwrap();
                let (mut far, _) = raw(&tls, target).await;
                tokio::spawn(async move {
                    tokio::select! {
                        _ = tokio::io::copy(&mut near.reader, &mut far.writer) => {}
                        _ = tokio::io::copy(&mut far.reader, &mut near.writer) => {}
                    }
                    let _ = near.writer.shutdown().await;
                });
            }
        });
        address
    }

    #[tokio::test]
    async fn a_man_in_the_middle_cannot_pass_a_proof_or_a_pin_on() {
        let (a, mut b) =
            (Node::start(1, in_cluster(Some(key(1, 7)))).await, Node::start(2, in_cluster(Some(key(1, 7)))).await);
        let middle = man_in_the_middle(b.address).await;
        let error = a.mesh.contact(middle).await.unwrap_err();
        assert!(matches!(error, ContactError::Rejected(Rejection::WrongKey)), "{error}");
        assert_eq!(b.rejected().await, Rejection::WrongKey);
        // Not even where the listener takes everybody: the dialer wants the proof or the pin.
        b.set(|rules| rules.key = None);
        assert_eq!(a.mesh.contact(middle).await.unwrap().standing, Standing::Stranger);
        a.pin(&b);
        let error = a.mesh.contact(middle).await.unwrap_err();
        assert!(matches!(error, ContactError::Rejected(Rejection::Replaced)), "{error}");
        assert_eq!(a.mesh.contact(b.address).await.unwrap().standing, Standing::Member);
    }

    #[tokio::test(flavor = "multi_thread", worker_threads = 2)]
    async fn many_requests_at_once_get_their_own_answers() {
        let (a, b) = members().await;
        a.mesh.know(b.id, vec![b.address]);
        let mut calls = tokio::task::JoinSet::new();
        for index in 0..300_usize {
            let (mesh, id) = (a.mesh.clone(), b.id);
            calls.spawn(async move {
                let length = if index % 50 == 0 { 1 << 20 } else { index * 37 % 40_000 };
                let message = vec![index as u8; length];
                assert_eq!(mesh.call(id, message.clone(), SOON).await.unwrap(), message);
            });
        }
        while let Some(done) = calls.join_next().await {
            done.unwrap();
        }
        let large = vec![5; BODY_BYTES_MAX];
        assert!(a.mesh.call(b.id, large.clone(), SOON * 3).await.unwrap() == large);
        assert_eq!(a.mesh.call(b.id, vec![5; BODY_BYTES_MAX + 1], SOON).await, Err(Unreachable));
        assert_eq!(a.ask(&b, b"who").await.unwrap(), "0000000000000001 Member");
    }

    #[tokio::test]
    async fn a_break_ends_calls_at_once_and_a_dead_process_is_told_as_such() {
        let (mut a, b) = members().await;
        a.mesh.know(b.id, vec![b.address]);
        a.up().await;
        assert_eq!(a.mesh.probe(b.id, SOON).await, Reach::Alive { boot: 200 });
        let (mesh, id) = (a.mesh.clone(), b.id);
        let hanging = tokio::spawn(async move { mesh.call(id, b"hang".to_vec(), SOON * 10).await });
        assert_eq!(a.mesh.call(b.id, b"hang".to_vec(), Duration::from_millis(700)).await, Err(Unreachable));
        // patience ends a call, not the link
        assert_eq!(a.ask(&b, b"who").await.unwrap(), "0000000000000001 Member");
        let (identity, address, rules) = (b.identity.clone(), b.address, b.trust.0.lock().unwrap().clone());
        drop(b);
        assert_eq!(timeout(Duration::from_secs(1), hanging).await.unwrap().unwrap(), Err(Unreachable));
        let mut down = a.event().await;
        if down == (Event::Down { node: id, refused: false }) {
            down = a.event().await;
        }
        assert_eq!(down, Event::Down { node: id, refused: true });
        assert_eq!(a.mesh.probe(id, SOON).await, Reach::Refused);
        assert_eq!(a.mesh.call(id, vec![], Duration::from_millis(100)).await, Err(Unreachable));
        assert!(!a.mesh.links()[0].up);
        let b = Node::start_at(2, rules, identity, address).await;
        assert_eq!(a.up().await.node, b.id, "and it was said once");
        assert_eq!(a.ask(&b, b"who").await.unwrap(), "0000000000000001 Member");
        a.mesh.forget(id);
        assert_eq!(a.ask(&b, b"who").await, Err(Unreachable));
        assert!(a.mesh.links().is_empty());
    }

    #[tokio::test]
    async fn a_peer_that_says_nothing_any_more_is_down_without_evidence() {
        let identity = Identity::generate(&crate::world::rng::OsRng).unwrap();
        let tls = Tls::new(&identity).unwrap();
        let mut a = Node::start(1, in_cluster(None)).await;
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        a.mesh.know(NodeId(50), vec![listener.local_addr().unwrap()]);
        let (stream, _) = listener.accept().await.unwrap();
        let (reader, writer) = stream.into_split();
        let connection = Connection { reader: Box::new(reader), writer: Box::new(writer), peer: String::new() };
        let (mut connection, _) = tls.accept(connection).await.unwrap();
        receive(&mut connection).await;
        let welcome = Message::Welcome { hello: node_hello(Channel::Control).encode(), proof: None };
        connection.writer.write_all(&welcome.encode()).await.unwrap();
        connection.writer.flush().await.unwrap();
        assert_eq!(receive(&mut connection).await.1, Message::Accepted);
        a.up().await;
        assert_eq!(a.event().await, Event::Down { node: NodeId(50), refused: false });
        drop((connection, listener));
        assert_eq!(a.event().await, Event::Down { node: NodeId(50), refused: true });
    }

    #[tokio::test]
    async fn bytes_right_behind_the_handshake_are_not_lost() {
        let (a, b) = members().await;
        let mut accepted = b.mesh.data_connections();
        a.mesh.know(b.id, vec![b.address]);
        let mut near = a.mesh.dial_data(b.id).await.unwrap();
        let bytes: Vec<u8> = (0..200_000_u32).map(|index| index as u8).collect();
        let sent = bytes.clone();
        let writing = tokio::spawn(async move {
            near.writer.write_all(&sent).await.unwrap();
            near.writer.flush().await.unwrap();
            near
        });
        let (node, mut far) = timeout(SOON, accepted.recv()).await.unwrap().unwrap();
        assert_eq!(node, a.id);
        let mut received = vec![0; bytes.len()];
        far.reader.read_exact(&mut received).await.unwrap();
        assert!(received == bytes);
        let mut near = writing.await.unwrap();
        far.writer.write_all(b"back").await.unwrap();
        far.writer.flush().await.unwrap();
        let mut back = [0; 4];
        near.reader.read_exact(&mut back).await.unwrap();
        assert_eq!(&back, b"back");

        // in the same record as the last message of the handshake
        let identity = Identity::generate(&crate::world::rng::OsRng).unwrap();
        b.set(|rules| rules.pins.extend([(NodeId(50), identity.fingerprint())]));
        let (mut connection, _) = raw(&Tls::new(&identity).unwrap(), b.address).await;
        let hello = Message::Hello { hello: node_hello(Channel::Data).encode(), proof: None };
        connection.writer.write_all(&hello.encode()).await.unwrap();
        connection.writer.flush().await.unwrap();
        assert!(matches!(receive(&mut connection).await.1, Message::Welcome { .. }));
        let mut last = Message::Accepted.encode();
        last.extend_from_slice(b"first bytes");
        connection.writer.write_all(&last).await.unwrap();
        connection.writer.flush().await.unwrap();
        let (_, mut far) = timeout(SOON, accepted.recv()).await.unwrap().unwrap();
        let mut first = [0; 11];
        far.reader.read_exact(&mut first).await.unwrap();
        assert_eq!(&first, b"first bytes");
    }

    #[tokio::test]
    async fn a_client_needs_the_key_and_nothing_else() {
        let mut b = Node::start(2, in_cluster(Some(key(1, 7)))).await;
        let mut clients = b.mesh.client_connections();
        let tls = Tls::anonymous();
        for (proves, expected) in [
            (Some(key(1, 7)), None),
            (Some(key(1, 8)), Some(Rejection::WrongKey)),
            (Some(key(0, 7)), Some(Rejection::OldKey { ours: 0, theirs: 1 })),
            (None, Some(Rejection::NotAdmitted)),
        ] {
            let (mut connection, session) = raw(&tls, b.address).await;
            let hello = Hello::for_client([1, 2]).encode();
            let proof = proves.map(|key| Proof::new(&key, Role::Dialer, &session.hello_exporter, &hello));
            connection.writer.write_all(&Message::Hello { hello, proof }.encode()).await.unwrap();
            connection.writer.flush().await.unwrap();
            match (receive(&mut connection).await.1, expected) {
                (Message::Welcome { .. }, None) => {
                    connection.writer.write_all(&Message::Accepted.encode()).await.unwrap();
                    connection.writer.write_all(b"ask").await.unwrap();
                    connection.writer.flush().await.unwrap();
                    let mut client = timeout(SOON, clients.recv()).await.unwrap().unwrap();
                    let mut asked = [0; 3];
                    client.reader.read_exact(&mut asked).await.unwrap();
                    // with the key replaced it is cut
                    b.set(|rules| rules.key = Some(key(2, 9)));
                    b.mesh.reconsider();
                    assert!(client.reader.read_exact(&mut asked).await.is_err());
                    b.set(|rules| rules.key = Some(key(1, 7)));
                }
                (Message::Rejected(rejection), Some(expected)) => {
                    assert_eq!(rejection, expected);
                    assert_eq!(b.rejected().await, expected.for_the_other_side());
                }
                other => panic!("{other:?}"),
            }
        }
        // a node must show a certificate
        let (mut connection, _) = raw(&tls, b.address).await;
        let hello = Message::Hello { hello: node_hello(Channel::Control).encode(), proof: None };
        connection.writer.write_all(&hello.encode()).await.unwrap();
        connection.writer.flush().await.unwrap();
        hangs_up(&mut *connection.reader).await;
    }

    #[tokio::test]
    async fn an_open_cluster_talks_plainly_and_reaches_newcomers() {
        let open = Rules { cluster: Some(1), open: true, ..Rules::default() };
        let (mut a, b) = (Node::start(1, open.clone()).await, Node::start(2, open.clone()).await);
        a.mesh.know(b.id, vec![b.address]);
        let peer = a.up().await;
        assert_eq!((peer.standing, peer.fingerprint), (Standing::Member, Fingerprint([0; 32])));
        assert_eq!(a.ask(&b, b"who").await.unwrap(), "0000000000000001 Member");
        a.mesh.dial_data(b.id).await.unwrap();
        let (sending, receiving) = (a.mesh.secrets().recv().await.unwrap(), b.mesh.secrets().recv().await.unwrap());
        assert!(sending.secret == receiving.secret);
        // a newcomer speaks TLS only, in both directions
        let newcomer = Node::start(3, Rules::default()).await;
        assert_eq!(a.mesh.contact(newcomer.address).await.unwrap().fingerprint, newcomer.identity.fingerprint());
        assert_eq!(newcomer.mesh.contact(a.address).await.unwrap().cluster, Some(1));
        let mut stream = TcpStream::connect(newcomer.address).await.unwrap();
        stream.write_all(&OPEN_MAGIC).await.unwrap();
        hangs_up(&mut stream).await;
        // closing the cluster ends the plain connections
        a.set(|rules| rules.open = false);
        a.mesh.reconsider();
        assert!(matches!(a.event().await, Event::Down { .. } | Event::Up(_)));
    }

    #[tokio::test]
    async fn a_change_of_standing_cuts_what_depends_on_it() {
        let (mut a, b) = members().await;
        let mut accepted = b.mesh.data_connections();
        a.mesh.know(b.id, vec![b.address]);
        a.up().await;
        let near = a.mesh.dial_data(b.id).await.unwrap();
        let (_, mut far) = timeout(SOON, accepted.recv()).await.unwrap().unwrap();
        b.mesh.reconsider();
        assert_eq!(a.ask(&b, b"who").await.unwrap(), "0000000000000001 Member", "nothing changed");
        tokio::time::sleep(Duration::from_millis(600)).await;
        b.set(|rules| rules.banned.extend([a.identity.fingerprint()]));
        b.mesh.reconsider();
        assert_eq!(far.reader.read_u8().await.unwrap_err().kind(), io::ErrorKind::ConnectionAborted);
        assert!(far.writer.write_all(b"x").await.is_err());
        assert_eq!(a.rejected().await, Rejection::Banned);
        assert_eq!(a.event().await, Event::Down { node: b.id, refused: false });
        drop(near);
        // a stranger that is let in comes up again with its new standing
        let (mut c, d) = (Node::start(3, Rules::default()).await, Node::start(4, Rules::default()).await);
        c.mesh.know(d.id, vec![d.address]);
        assert_eq!(c.up().await.standing, Standing::Stranger);
        tokio::time::sleep(Duration::from_millis(600)).await;
        c.pin(&d);
        c.mesh.reconsider();
        assert_eq!(c.up().await.standing, Standing::Member);
    }

    #[tokio::test]
    async fn hostile_bytes_do_no_harm() {
        let (a, b) = members().await;
        let tls = Tls::new(&Identity::generate(&crate::world::rng::OsRng).unwrap()).unwrap();
        let mut noise: Vec<Vec<u8>> = vec![
            b"GET / HTTP/1.1\r\n\r\n".to_vec(),
            vec![0x16; 3000],
            vec![0x16, 3, 1, 0xff, 0xff, 1, 0xff, 0xff, 0xff],
            b"SHEEPOPX".to_vec(),
            b"SHEE".to_vec(),
            vec![],
        ];
        noise.extend((0..20_u32).map(|seed| blake3::hash(&seed.to_le_bytes()).as_bytes().repeat(100)));
        for bytes in noise {
            let mut stream = TcpStream::connect(b.address).await.unwrap();
            // it may hang up before all of it was taken
            let _ = stream.write_all(&bytes).await;
            let _ = stream.shutdown().await;
            hangs_up(&mut stream).await;
        }
        let hello = Message::Hello { hello: node_hello(Channel::Control).encode(), proof: None }.encode();
        let mut giant = hello.clone();
        giant[12..16].copy_from_slice(&u32::MAX.to_le_bytes());
        let mut above = hello.clone();
        above[12..16].copy_from_slice(&((16_u32 << 10) + 1).to_le_bytes());
        let mut longer = hello.clone();
        longer[12] += 1;
        longer.push(0);
        let wrong_order = Message::Accepted.encode();
        for bytes in [giant, above, longer, wrong_order, hello[..20].to_vec(), vec![0xff; 500]] {
            let (mut connection, _) = raw(&tls, b.address).await;
            connection.writer.write_all(&bytes).await.unwrap();
            let _ = connection.writer.shutdown().await;
            hangs_up(&mut *connection.reader).await;
        }
        // frames behind a good handshake: unknown kind, giant body, more than a stranger may send, an answer to nothing
        let headers: [[u8; 13]; 5] = [
            [0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 9],
            [0xff, 0xff, 0xff, 0xff, 0, 0, 0, 0, 0, 0, 0, 0, 1],
            [1, 0, 0x40, 0, 0, 0, 0, 0, 0, 0, 0, 0, 1],
            [0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 2],
            [1, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 3],
        ];
        for header in headers {
            let (mut connection, _) = raw(&tls, b.address).await;
            connection.writer.write_all(&hello).await.unwrap();
            connection.writer.flush().await.unwrap();
            assert!(matches!(receive(&mut connection).await.1, Message::Welcome { .. }));
            connection.writer.write_all(&Message::Accepted.encode()).await.unwrap();
            connection.writer.write_all(&header).await.unwrap();
            connection.writer.flush().await.unwrap();
            hangs_up(&mut *connection.reader).await;
        }
        assert_eq!(a.mesh.contact(b.address).await.unwrap().standing, Standing::Member);
    }

    #[tokio::test]
    async fn connections_that_never_finish_are_dropped_and_counted() {
        let (mut a, b) = members().await;
        let mut idle = Vec::new();
        for index in 0..100_u8 {
            let mut stream = TcpStream::connect(b.address).await.unwrap();
            if index % 2 == 0 {
                stream.write_all(&[0x16, 3, 1]).await.unwrap();
            }
            idle.push(stream);
        }
        a.mesh.know(b.id, vec![b.address]);
        for stream in &mut idle {
            hangs_up(stream).await;
        }
        assert_eq!(a.up().await.node, b.id);
        // one that finishes TLS and stops there
        let tls = Tls::new(&Identity::generate(&crate::world::rng::OsRng).unwrap()).unwrap();
        let (mut connection, _) = raw(&tls, b.address).await;
        hangs_up(&mut *connection.reader).await;
        // one that drips
        let (mut connection, _) = raw(&tls, b.address).await;
        let hello = Message::Hello { hello: node_hello(Channel::Control).encode(), proof: None }.encode();
        let dripping = async {
            for byte in hello.chunks(1) {
                if connection.writer.write_all(byte).await.is_err() || connection.writer.flush().await.is_err() {
                    break;
                }
                tokio::time::sleep(Duration::from_millis(50)).await;
            }
        };
        tokio::select! {
            () = dripping => {}
            () = hangs_up(&mut *connection.reader) => {}
        }
        assert_eq!(a.ask(&b, b"who").await.unwrap(), "0000000000000001 Member");
    }

    #[tokio::test]
    async fn a_stranger_has_few_requests_under_way() {
        let (a, b) = (Node::start(1, Rules::default()).await, Node::start(2, Rules::default()).await);
        a.mesh.know(b.id, vec![b.address]);
        let hanging: Vec<_> = (0..7)
            .map(|_| {
                let (mesh, id) = (a.mesh.clone(), b.id);
                tokio::spawn(async move { mesh.call(id, b"hang".to_vec(), Duration::from_secs(2)).await })
            })
            .collect();
        tokio::time::sleep(Duration::from_millis(300)).await;
        assert_eq!(a.ask(&b, b"who").await.unwrap(), "0000000000000001 Stranger", "the eighth is taken");
        for call in hanging {
            assert_eq!(call.await.unwrap(), Err(Unreachable));
        }
    }
}
