//! Decompressed clusters, kept for small reads: of the image and of its backing files, for one handle.
//!
//! What is kept is found by the extent that an entry refers to, and an extent is changed by nobody as long as an entry
//! refers to it. So it is enough that no extent comes into an entry while something older is kept of it:
//!
//! - Whoever reads an extent has pinned the epoch, or holds the claim on the cluster, from before its lookup until what
//!   it has read is kept (M1). Until then the bytes of the extent are not handed out again, if the entry lets go of them
//!   meanwhile (M2).
//! - Bytes for an extent are handed out by `Allocator::reserve_bytes` and nowhere else. Between that and the moment at
//!   which the first entry refers to the extent, what is kept of it is forgotten ([`ClusterCache::forget`]). Nobody keeps
//!   anything of it in between: older readers have ended, and newer ones find no entry.
//! - Who has begun to read before it is forgotten, and keeps it after, breaks one of the above; that can only be in an
//!   image whose counts are too low. It is not kept then.
//!
//! An extent that a snapshot refers to, too, stays as it is for both. Backing files do not change at all.
//!
//! One request decompresses a cluster, and others that want it meanwhile wait. Who decompresses waits for nothing but I/O
//! and processors, so that no circle can close (M8).

use std::collections::{BTreeMap, HashMap, HashSet};
use std::sync::{Arc, Mutex};

use crate::format::l2::CompressedExtent;
use crate::wait::{Claim, Claims, lock};

/// What a cluster takes beside its bytes, about.
const OVERHEAD_BYTES: u64 = 256;

/// Where a cluster is stored: index of the file in the chain, and the extent.
pub type Key = (usize, CompressedExtent);

struct Kept {
    cluster: Arc<[u8]>,
    used_at: u64,
}

#[derive(Default)]
struct Inner {
    kept: HashMap<Key, Kept>,
    by_use: BTreeMap<u64, Key>, // oldest first
    uses: u64,
    bytes: u64,
    loading: HashSet<Key>, // being decompressed, and not forgotten meanwhile
}

/// See the module text.
#[derive(Default)]
pub struct ClusterCache {
    budget_bytes: u64,
    inner: Mutex<Inner>,
    loads: Claims, // by host offset
}

/// A cluster that is kept, or the right to be the one who decompresses it.
pub enum Found<'a> {
    /// It is kept.
    Kept(Arc<[u8]>),
    /// It is not, and nobody else decompresses it until this is dropped.
    Load(Load<'a>),
}

/// See [`Found::Load`].
pub struct Load<'a> {
    cache: &'a ClusterCache,
    key: Key,
    _claim: Claim<'a>,
}

impl Inner {
    fn find(&mut self, key: &Key) -> Option<Arc<[u8]>> {
        let kept = self.kept.get_mut(key)?;
        self.by_use.remove(&kept.used_at);
        self.uses += 1;
        kept.used_at = self.uses;
        self.by_use.insert(self.uses, *key);
        Some(kept.cluster.clone())
    }

    fn remove(&mut self, key: &Key) {
        if let Some(kept) = self.kept.remove(key) {
            self.by_use.remove(&kept.used_at);
            self.bytes -= cost(kept.cluster.len());
        }
    }

    fn insert(&mut self, key: Key, cluster: Arc<[u8]>, budget: u64) {
        self.remove(&key);
        let cost = cost(cluster.len());
        while self.bytes + cost > budget {
            let Some((_, &oldest)) = self.by_use.first_key_value() else { return };
            self.remove(&oldest);
        }
        self.uses += 1;
        self.bytes += cost;
        self.by_use.insert(self.uses, key);
        self.kept.insert(key, Kept { cluster, used_at: self.uses });
    }
}

fn cost(cluster_bytes: usize) -> u64 {
    cluster_bytes as u64 + OVERHEAD_BYTES
}

impl ClusterCache {
    /// One that takes so much memory, at most.
    pub fn new(budget_bytes: u64) -> Self {
        Self { budget_bytes, ..Self::default() }
    }

    /// What it may take.
    pub fn budget_bytes(&self) -> u64 {
        self.budget_bytes
    }

    /// Whether a cluster of that size is kept at all.
    pub fn takes(&self, cluster_bytes: u64) -> bool {
        cluster_bytes + OVERHEAD_BYTES <= self.budget_bytes
    }

    /// Finds a cluster; if somebody decompresses it, waits for that. The caller has pinned the epoch, or holds the claim
    /// on the guest cluster, from before it found the extent until it drops what this returns.
    pub async fn find(&self, key: Key) -> Found<'_> {
        if let Some(cluster) = lock(&self.inner).find(&key) {
            return Found::Kept(cluster);
        }
        let at = key.1.offset.0;
        let claim = self.loads.claim(at..at + 1).await;
        let mut inner = lock(&self.inner);
        match inner.find(&key) {
            Some(cluster) => Found::Kept(cluster),
            None => {
                inner.loading.insert(key);
                Found::Load(Load { cache: self, key, _claim: claim })
            }
        }
    }

    /// Forgets what is known of extents of the image itself, which have been handed out again and are in no entry yet.
    pub fn forget(&self, extents: &[CompressedExtent]) {
        if self.budget_bytes == 0 {
            return;
        }
        let mut inner = lock(&self.inner);
        for extent in extents {
            let key = (0, *extent);
            inner.loading.remove(&key);
            inner.remove(&key);
        }
    }
}

impl Load<'_> {
    /// Keeps what has come out, unless it was forgotten in the meantime.
    pub fn keep(&self, cluster: &[u8]) {
        let cluster = Arc::from(cluster);
        let mut inner = lock(&self.cache.inner);
        if inner.loading.contains(&self.key) {
            inner.insert(self.key, cluster, self.cache.budget_bytes);
        }
    }
}

impl Drop for Load<'_> {
    fn drop(&mut self) {
        lock(&self.cache.inner).loading.remove(&self.key);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::format::HostOffset;
    use crate::wait::block_on;

    const CLUSTER: usize = 4096;

    fn key(n: u64) -> Key {
        (0, CompressedExtent::new(HostOffset(n * 1000), 900))
    }

    fn load(cache: &ClusterCache, n: u64) -> Option<Load<'_>> {
        match block_on(cache.find(key(n))) {
            Found::Kept(cluster) => {
                assert_eq!(*cluster, [n as u8; CLUSTER]);
                None
            }
            Found::Load(load) => Some(load),
        }
    }

    #[test]
    fn what_was_used_last_is_kept_within_the_budget() {
        let cache = ClusterCache::new(4 * cost(CLUSTER) + 100);
        assert!(cache.takes(CLUSTER as u64) && !cache.takes(4 * cost(CLUSTER)));
        for n in 0..4 {
            load(&cache, n).unwrap().keep(&[n as u8; CLUSTER]);
        }
        assert!(load(&cache, 0).is_none() && load(&cache, 1).is_none());
        load(&cache, 9).unwrap().keep(&[9; CLUSTER]);
        for (n, is_kept) in [(2, false), (3, true), (0, true), (1, true), (9, true)] {
            assert_eq!(load(&cache, n).is_none(), is_kept, "{n}"); // a load that comes to nothing keeps nothing
        }
        let inner = lock(&cache.inner);
        assert_eq!((inner.bytes, inner.kept.len(), inner.by_use.len()), (4 * cost(CLUSTER), 4, 4));
        assert!(inner.loading.is_empty());
    }

    #[test]
    fn what_is_forgotten_is_not_kept_by_who_began_before() {
        let cache = ClusterCache::new(1 << 20);
        load(&cache, 1).unwrap().keep(&[1; CLUSTER]);
        cache.forget(&[key(1).1, key(2).1]);
        let late = load(&cache, 1).unwrap();
        cache.forget(&[key(1).1]);
        late.keep(&[0xee; CLUSTER]);
        drop(late);
        load(&cache, 1).unwrap().keep(&[1; CLUSTER]);
        assert!(load(&cache, 1).is_none());
        // An extent of a backing file at the same place is another one.
        let below = (1, key(1).1);
        let Found::Load(load_below) = block_on(cache.find(below)) else { panic!("not kept") };
        load_below.keep(&[5; CLUSTER]);
        drop(load_below);
        cache.forget(&[key(1).1]);
        assert!(matches!(block_on(cache.find(below)), Found::Kept(_)));
    }
}
