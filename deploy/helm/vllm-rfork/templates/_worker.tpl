{{/* One worker: workerDefaults with its own values over them, and derived ones. Argument: a dict with root, name, values. */}}
{{- define "rfork.worker" -}}
{{- $worker := mustMergeOverwrite (mustDeepCopy .root.Values.workerDefaults) (mustDeepCopy .values) -}}
{{- $_ := set $worker "name" (printf "%s-%s" (include "rfork.fullname" .root) .name) -}}
{{- $_ := set $worker "ascendDevices" (hasPrefix "ascend-" $worker.platform) -}}
{{- $resource := ternary "huawei.com/Ascend910" "nvidia.com/gpu" $worker.ascendDevices -}}
{{- $_ := set $worker "deviceResource" ($worker.deviceResource | default $resource) -}}
{{- $pods := ternary (int $worker.multiNode.size) 1 $worker.multiNode.enabled -}}
{{- $_ := set $worker "tensorParallel" (int $worker.tensorParallel | default (mul $pods (int $worker.devices))) -}}
{{- $_ := set $worker "strategy" ($worker.strategy | default .name) -}}
{{- $_ := set $worker.model "identity" ($worker.model.identity | default $worker.model.path) -}}
{{- $image := dict "root" .root "image" $worker.image "variant" (ternary "-a3" "" (eq $worker.platform "ascend-a3")) -}}
{{- $_ := set $image "name" (ternary "vllm-rfork-ascend" "vllm-rfork-cuda" $worker.ascendDevices) -}}
{{- $_ := set $worker "imageReference" (include "rfork.image" $image) -}}
{{- toYaml $worker -}}
{{- end -}}

{{/* Fails for values that would not work together. Argument: a dict with root, name, worker. */}}
{{- define "rfork.checkWorker" -}}
{{- $tls := .root.Values.tls -}}
{{- $policy := .root.Values.networkPolicy -}}
{{- if and .worker.ascendDevices .worker.rdma.enabled -}}
{{- fail (printf "workers.%s: rdma is for cuda; NPUs reach each other by their own network (hccn.conf)" .name) -}}
{{- end -}}
{{- if and .worker.hostNetwork $policy.enabled (not $policy.plannerFrom) -}}
{{- fail (printf "workers.%s: hostNetwork gives pods their node's address, which the planner's NetworkPolicy rejects: set networkPolicy.plannerFrom to the nodes' ipBlock" .name) -}}
{{- end -}}
{{- if and (eq (get .worker.options "rfork_caches" | toString) "code") (not (and $tls.enabled (eq $tls.seeds "require"))) -}}
{{- fail (printf "workers.%s: rfork_caches=code needs tls.enabled and tls.seeds=require, otherwise workers take no code" .name) -}}
{{- end -}}
{{- end -}}

{{/* The JSON for --model-loader-extra-config. In the pod's template, so a change of an option rolls the pods. */}}
{{- define "rfork.workerOptions" -}}
{{- $own := dict "model_url" .worker.model.identity -}}
{{- $_ := set $own "model_deploy_strategy_name" .worker.strategy -}}
{{- with .worker.seedPort -}}{{- $_ := set $own "rfork_seed_port_base" (int .) -}}{{- end -}}
{{- range $name := append (keys $own | sortAlpha) "rfork_scheduler_url" -}}
{{- if hasKey $.worker.options $name -}}{{- fail (printf "workers: options.%s is set by the chart" $name) -}}{{- end -}}
{{- end -}}
{{- if hasKey .worker.options "rfork_token" -}}
{{- fail "workers: a token in options would be readable for everybody who may read pods; auth.existingSecret holds it" -}}
{{- end -}}
{{- /* Kubernetes expands $(NAME) in arguments; $$( is its escape. */ -}}
{{- merge $own .worker.options | mustToJson | replace "$(" "$$(" -}}
{{- end -}}

{{/* Metadata and spec of one pod. Argument: a dict with root, worker, labels, and role: all, leader or follower. */}}
{{- define "rfork.workerPod" -}}
{{- $worker := .worker -}}
{{- $root := .root -}}
metadata:
  labels:
    {{- include "rfork.podLabels" .labels | nindent 4 }}
    rfork/worker: "true"
    rfork/api: {{ ne .role "follower" | quote }}
  annotations:
    # Labels that the PodMonitor adds to this pod's metrics
    rfork/model: {{ $worker.model.identity | quote }}
    rfork/strategy: {{ $worker.strategy | quote }}
    {{- with $worker.annotations }}
    {{- toYaml . | nindent 4 }}
    {{- end }}
spec:
  {{- include "rfork.podSpec" $root | nindent 2 }}
  terminationGracePeriodSeconds: {{ $worker.terminationSeconds }}
  {{- if $worker.hostPID }}
  # One pid namespace for the node, so that NIXL can read the memory of another pod without RDMA.
  hostPID: true
  {{- end }}
  {{- if $worker.hostNetwork }}
  # NetworkPolicies do not apply to this pod: filter on the host.
  hostNetwork: true
  dnsPolicy: ClusterFirstWithHostNet
  {{- end }}
  containers:
    - name: vllm
      image: {{ $worker.imageReference }}
      imagePullPolicy: {{ $worker.image.pullPolicy }}
      # The first instance loads from storage, all later ones fork; the command is the same.
      command: [vllm, serve]
      args:
        - {{ $worker.model.path | quote }}
        - --port={{ $worker.port }}
        - --served-model-name={{ $worker.model.servedName }}
        - --tensor-parallel-size={{ $worker.tensorParallel }}
        {{- if ne .role "all" }}
        - --distributed-executor-backend=mp
        - --nnodes=$(LWS_GROUP_SIZE)
        - --node-rank=$(LWS_WORKER_INDEX)
        - --master-addr=$(LWS_LEADER_ADDRESS)
        {{- end }}
        {{- if eq .role "follower" }}
        - --headless
        {{- end }}
        {{- if $worker.fork }}
        - --load-format=rfork
        - {{ printf "--model-loader-extra-config=%s" (include "rfork.workerOptions" .) | quote }}
        {{- end }}
        {{- range $worker.args }}
        - {{ . | quote }}
        {{- end }}
      env:
        - name: NODE_NAME
          valueFrom:
            fieldRef: {fieldPath: spec.nodeName}
        {{- with $worker.env }}
        {{- toYaml . | nindent 8 }}
        {{- end }}
        {{- $own := false }}
        {{- range $worker.env }}{{ if eq .name "VLLM_ENGINE_READY_TIMEOUT_S" }}{{ $own = true }}{{ end }}{{ end }}
        {{- if not $own }}
        - {name: VLLM_ENGINE_READY_TIMEOUT_S, value: {{ $worker.startupSeconds | quote }}}
        {{- end }}
        - name: RFORK_LABELS
          value: host=$(NODE_NAME){{ with $worker.labels }},{{ . }}{{ end }}
        - name: RFORK_SCHEDULER_URL
          value: {{ include "rfork.plannerUrls" $root }}
        {{- if ne .role "all" }}
        - name: VLLM_HOST_IP
          valueFrom:
            fieldRef: {fieldPath: status.podIP}
        {{- end }}
        {{- if $root.Values.auth.enabled }}
        # The first line is sent, both are accepted. Read again when the Secret changes: new tokens need no restart.
        - {name: RFORK_TOKEN_FILE, value: /etc/rfork-token/token}
        {{- end }}
        {{- if $root.Values.tls.enabled }}
        - {name: RFORK_TLS_CA_FILE, value: /etc/rfork-tls/ca.crt}
        - {name: RFORK_TLS_CERT_FILE, value: /etc/rfork-tls/tls.crt}
        - {name: RFORK_TLS_KEY_FILE, value: /etc/rfork-tls/tls.key}
        - {name: RFORK_SEED_TLS, value: {{ $root.Values.tls.seeds | quote }}}
        - {name: RFORK_SEED_TLS_NAME, value: {{ $root.Values.tls.workerName }}}
        {{- if eq $root.Values.tls.seeds "require" }}
        - {name: RFORK_SEED_TLS_CLIENT_CA_FILE, value: /etc/rfork-tls/ca.crt}
        {{- end }}
        {{- end }}
        {{- with $worker.rdma }}
        {{- if .enabled }}
        {{- with .netDevices }}
        - {name: UCX_NET_DEVICES, value: {{ . | quote }}}
        {{- end }}
        {{- range $variable, $value := .env }}
        - {name: {{ $variable }}, value: {{ $value | toString | quote }}}
        {{- end }}
        {{- end }}
        {{- end }}
      {{- if ne .role "follower" }}
      ports:
        - {name: api, containerPort: {{ $worker.port }}}
      startupProbe:
        httpGet: {path: /health, port: api}
        periodSeconds: 5
        failureThreshold: {{ div (int $worker.startupSeconds) 5 }}
      readinessProbe:
        httpGet: {path: /health, port: api}
        periodSeconds: 5
        timeoutSeconds: 5
      livenessProbe:
        httpGet: {path: /health, port: api}
        periodSeconds: 15
        timeoutSeconds: 10
        failureThreshold: 4
      {{- end }}
      {{- $devices := dict $worker.deviceResource $worker.devices }}
      {{- if $worker.rdma.enabled }}{{ $_ := set $devices $worker.rdma.resource $worker.rdma.count }}{{ end }}
      resources:
        requests: {{- toYaml (merge (deepCopy $devices) $worker.resources.requests) | nindent 10 }}
        limits: {{- toYaml (merge (deepCopy $devices) $worker.resources.limits) | nindent 10 }}
      securityContext:
        allowPrivilegeEscalation: false
        {{- if $worker.rdma.enabled }}
        capabilities: {add: [IPC_LOCK]}  # to register memory with the NIC
        {{- end }}
      volumeMounts:
        {{- if $root.Values.auth.enabled }}
        - {name: token, mountPath: /etc/rfork-token, readOnly: true}
        {{- end }}
        {{- if $root.Values.tls.enabled }}
        - {name: tls, mountPath: /etc/rfork-tls, readOnly: true}
        {{- end }}
        {{- if $worker.model.claim }}
        - {name: models, mountPath: {{ $worker.model.mountPath }}, readOnly: true}
        {{- end }}
        - {name: shm, mountPath: /dev/shm}
        {{- if and $worker.ascendDevices $worker.ascend.driverMounts }}
        {{- range $path := include "rfork.ascendPaths" . | fromJsonArray }}
        - {name: {{ $path.name }}, mountPath: {{ $path.path }}, readOnly: true}
        {{- end }}
        {{- end }}
        {{- with $worker.volumeMounts }}
        {{- toYaml . | nindent 8 }}
        {{- end }}
  volumes:
    {{- if $root.Values.auth.enabled }}
    - name: token
      secret:
        secretName: {{ $root.Values.auth.existingSecret }}
        items: [{key: token, path: token}]
    {{- end }}
    {{- if $root.Values.tls.enabled }}
    - name: tls
      secret: {secretName: {{ include "rfork.fullname" $root }}-worker-tls}
    {{- end }}
    {{- with $worker.model.claim }}
    - name: models
      persistentVolumeClaim: {claimName: {{ . }}}
    {{- end }}
    - name: shm
      emptyDir: {medium: Memory, sizeLimit: {{ $worker.shm }}}
    {{- if and $worker.ascendDevices $worker.ascend.driverMounts }}
    {{- range $path := include "rfork.ascendPaths" . | fromJsonArray }}
    - name: {{ $path.name }}
      hostPath: {path: {{ $path.path }}, type: {{ $path.type }}}
    {{- end }}
    {{- end }}
    {{- with $worker.volumes }}
    {{- toYaml . | nindent 4 }}
    {{- end }}
  {{- with include "rfork.scheduling" $worker | trim }}
  {{- nindent 2 . }}
  {{- end }}
{{- end -}}

{{/* The driver and the addresses of the NPUs' own network, as vLLM-Ascend's containers mount them. */}}
{{- define "rfork.ascendPaths" -}}
[{"name": "ascend-driver", "path": "/usr/local/Ascend/driver", "type": "Directory"},
 {"name": "ascend-dcmi", "path": "/usr/local/dcmi", "type": "Directory"},
 {"name": "npu-smi", "path": "/usr/local/bin/npu-smi", "type": "File"},
 {"name": "ascend-install", "path": "/etc/ascend_install.info", "type": "File"},
 {"name": "hccn", "path": "/etc/hccn.conf", "type": "File"}]
{{- end -}}
