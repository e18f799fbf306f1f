package qcow2

const snapshotFixed = 40 // bytes of a snapshot table entry before its variable part
