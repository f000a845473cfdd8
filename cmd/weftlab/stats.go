//go:build linux

package main

import (
	"math"
	"slices"
)

// median returns the middle value, or the mean of the two in the middle.
func median(values []float64) float64 {
	if len(values) == 0 {
		return math.NaN()
	}
	s := slices.Sorted(slices.Values(values))
	if n := len(s); n%2 == 0 {
		return (s[n/2-1] + s[n/2]) / 2
	}
	return s[len(s)/2]
}

// ratio is how many times as much something is as something else, and between
// which bounds that lies with 95 % confidence.
type ratio struct {
	mean, low, high float64
}

// pairedRatio compares values that were measured together, pair by pair: the
// geometric mean of their ratios, with the interval of Student's t over the
// logarithms. Where it cannot be told, all is NaN.
func pairedRatio(values, base []float64) ratio {
	var logs []float64
	for i := range min(len(values), len(base)) {
		if values[i] > 0 && base[i] > 0 {
			logs = append(logs, math.Log(values[i]/base[i]))
		}
	}
	n := float64(len(logs))
	if n == 0 {
		return ratio{math.NaN(), math.NaN(), math.NaN()}
	}
	var sum, squares float64
	for _, l := range logs {
		sum += l
	}
	mean := sum / n
	for _, l := range logs {
		squares += (l - mean) * (l - mean)
	}
	if n < 2 {
		return ratio{math.Exp(mean), math.NaN(), math.NaN()}
	}
	half := student(len(logs)-1) * math.Sqrt(squares/(n-1)/n)
	return ratio{math.Exp(mean), math.Exp(mean - half), math.Exp(mean + half)}
}

// student is the 97.5 % quantile of Student's t distribution: exact to three
// digits up to 20 degrees of freedom, and from there by Cornish and Fisher's
// expansion, which is as good there.
func student(degrees int) float64 {
	exact := []float64{
		12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228,
		2.201, 2.179, 2.160, 2.145, 2.131, 2.120, 2.110, 2.101, 2.093, 2.086,
	}
	if degrees <= len(exact) {
		return exact[degrees-1]
	}
	const z = 1.959964
	d := float64(degrees)
	z3, z5, z7 := z*z*z, math.Pow(z, 5), math.Pow(z, 7)
	return z + (z3+z)/(4*d) + (5*z5+16*z3+3*z)/(96*d*d) + (3*z7+19*z5+17*z3-15*z)/(384*d*d*d)
}
