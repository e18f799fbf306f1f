// Package house holds no code: its tests keep the rules of the house, which
// packages may import which, and that what the documentation names exists.
package house
