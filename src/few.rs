//! A list that takes nothing from the heap as long as it has one element: nearly every request touches one cluster.
//! A leaf.

use std::ops::{Deref, DerefMut};

/// A list of few elements.
#[derive(Debug, Clone)]
pub enum Few<T> {
    /// One.
    One([T; 1]),
    /// None, or several.
    Many(Vec<T>),
}

impl<T> Few<T> {
    /// Appends an element.
    pub fn push(&mut self, element: T) {
        *self = match std::mem::take(self) {
            Self::One([first]) => Self::Many(vec![first, element]),
            Self::Many(many) if many.capacity() == 0 => Self::One([element]),
            Self::Many(mut many) => {
                many.push(element);
                Self::Many(many)
            }
        };
    }
}

impl<T> Default for Few<T> {
    fn default() -> Self {
        Self::Many(Vec::new())
    }
}

impl<T> Deref for Few<T> {
    type Target = [T];

    #[inline]
    fn deref(&self) -> &[T] {
        match self {
            Self::One(one) => one,
            Self::Many(many) => many,
        }
    }
}

impl<T> DerefMut for Few<T> {
    #[inline]
    fn deref_mut(&mut self) -> &mut [T] {
        match self {
            Self::One(one) => one,
            Self::Many(many) => many,
        }
    }
}

impl<T> FromIterator<T> for Few<T> {
    fn from_iter<I: IntoIterator<Item = T>>(elements: I) -> Self {
        let mut elements = elements.into_iter();
        let Some(first) = elements.next() else { return Self::default() };
        match elements.next() {
            None => Self::One([first]),
            Some(second) => Self::Many([first, second].into_iter().chain(elements).collect()),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn it_holds_what_a_vector_holds() {
        for n in 0..5 {
            let expected: Vec<usize> = (0..n).collect();
            let collected: Few<usize> = (0..n).collect();
            let mut pushed = Few::default();
            (0..n).for_each(|i| pushed.push(i));
            assert_eq!((&collected[..], &pushed[..]), (&expected[..], &expected[..]));
            assert_eq!(matches!(collected, Few::One(_)), n == 1);
            assert_eq!(matches!(pushed, Few::One(_)), n == 1);
            pushed.iter_mut().for_each(|i| *i += 1);
            assert_eq!(pushed.iter().sum::<usize>(), expected.iter().sum::<usize>() + n);
        }
    }
}
