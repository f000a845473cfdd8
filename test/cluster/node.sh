# What a node runs, as the first process of a namespace of processes. All that it
# keeps is in the node's own /run.
set -e
group=$0 kubeconfig=$1 ip=$2 kubelet=$3 proxy=$4 mode=$5 pods=$6 pause=$7 name=$8 dns=$9

# As systemd leaves it: what is mounted on a node is seen by containers that ask for it.
mount --make-rshared /

# The CNI library and the kubelet have fixed places below these.
for dir in /var/lib /var/log /etc /opt; do
	mkdir -p /run/overlay$dir /run/work$dir
	mount -t overlay overlay -o lowerdir=$dir,upperdir=/run/overlay$dir,workdir=/run/work$dir $dir
done
mkdir -p /var/lib/cni /var/lib/weft /etc/cni/net.d /opt/cni/bin /run/flannel
rm -f /etc/cni/net.d/* /opt/cni/bin/*
ln -s /usr/lib/cni/* /opt/cni/bin

# Settings of the whole machine, which the kubelet would change: copies of its own.
own() { # setting value
	copy=/run/sysctl-$(echo $1 | tr / -)
	echo $2 >$copy
	mount --bind $copy /proc/sys/$1
}
own vm/overcommit_memory 1
own vm/panic_on_oom 0
own kernel/panic 10
own kernel/panic_on_oops 1
own kernel/keys/root_maxkeys 1000000
own kernel/keys/root_maxbytes 25000000

# A root in a container can't lower an oom_score_adj.
cat >/run/containerd.toml <<TOML
version = 2
root = "/run/containerd-root"
state = "/run/containerd"
[plugins."io.containerd.grpc.v1.cri"]
  sandbox_image = "$pause"
  restrict_oom_score_adj = true
  [plugins."io.containerd.grpc.v1.cri".cni]
    bin_dir = "/opt/cni/bin"
    conf_dir = "/etc/cni/net.d"
  [plugins."io.containerd.grpc.v1.cri".containerd.runtimes.runc]
    runtime_type = "io.containerd.runc.v2"
TOML
cat >/run/kubelet.yaml <<YAML
apiVersion: kubelet.config.k8s.io/v1beta1
kind: KubeletConfiguration
failCgroupV1: false
cgroupDriver: cgroupfs
cgroupRoot: /$group
enforceNodeAllocatable: []
containerRuntimeEndpoint: unix:///run/containerd/containerd.sock
authentication: {anonymous: {enabled: true}, webhook: {enabled: false}}
authorization: {mode: AlwaysAllow}
failSwapOn: false
evictionHard: {memory.available: "0%", nodefs.available: "0%", imagefs.available: "0%"}
imageGCHighThresholdPercent: 100
localStorageCapacityIsolation: false
address: $ip
clusterDNS: [$dns]
clusterDomain: cluster.local
nodeStatusUpdateFrequency: 5s
YAML

containerd --config /run/containerd.toml >/run/containerd.log 2>&1 &
# Settings of conntrack for the whole machine are left alone (0).
$proxy --kubeconfig $kubeconfig --hostname-override $name --proxy-mode $mode --cluster-cidr $pods \
	--conntrack-max-per-core 0 --conntrack-min 0 \
	--conntrack-tcp-timeout-established 0 --conntrack-tcp-timeout-close-wait 0 >/run/kube-proxy.log 2>&1 &
until [ -e /run/images-are-here ]; do sleep 0.1; done
$kubelet --config /run/kubelet.yaml --kubeconfig $kubeconfig --root-dir /run/kubelet --hostname-override $name --node-ip $ip
